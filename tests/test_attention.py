"""Paged attention: batches, precision of the cache, page selections, windows, threads."""
import numba
import numpy as np
import pytest

from edgeattn.kernels_cpu.cached_attention import PagedCache, attend
from edgeattn.page_formats import PAGE
from edgeattn.reference.cached_attention import cached_attention as reference, rotate

MAX_POSITION = 2048
EXACT = 4e-6    # float32 sums of up to 1,500 weighted values of size 1
HALF = 4e-3     # halves round keys and values by 2**-11 of their size: 5e-4 of scores up to 4, and of values up to 4


def angles(rotary_dim):
    turns = np.arange(MAX_POSITION)[:, None] / 10000 ** (np.arange(rotary_dim // 2) / (rotary_dim // 2))
    return np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)


class Example:
    """Sequences given as (cached tokens, new tokens), q, k and v being views of fused rows."""

    def __init__(self, sequences, *, heads=4, kv_heads=2, head_dim=64, window=0, scale=None):
        rng, self.sequences = np.random.default_rng(), sequences
        self.attributes = dict(num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=head_dim, window=window,
                               scale=scale or head_dim ** -0.5)
        tokens = sum(new for _, new in sequences)
        fused = rng.standard_normal((tokens, (heads + 2 * kv_heads) * head_dim), np.float32)
        self.q, self.k, self.v = np.split(fused, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)
        self.cos, self.sin = angles(head_dim)
        self.positions = np.concatenate([np.arange(past, past + new) for past, new in sequences])
        self.keys, self.values = ([rng.standard_normal((kv_heads, past, head_dim), np.float32) for past, _ in sequences] for _ in "kv")

    def cache(self, **options):
        return PagedCache(self.keys, self.values, [new for _, new in self.sequences], **options)

    def run(self, cache, selection=None):
        return attend(cache, self.q, self.k, self.v, self.cos, self.sin, self.positions, selection=selection, **self.attributes)

    def expected(self):
        """The reference, sequence by sequence: outputs, and (key, value) of each."""
        outputs, present, start = [], [], 0
        for (_, new), key, value in zip(self.sequences, self.keys, self.values):
            rows = slice(start, start + new)
            out, *after = reference(self.q[rows], self.k[rows], self.v[rows], self.cos, self.sin, key, value, self.positions[rows],
                                    **self.attributes)
            outputs.append(out)
            present.append(after)
            start += new
        return np.concatenate(outputs), present


def close(got, expected, tolerance=EXACT):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


MIXED = [(31, 1), (0, 40), (1000, 1), (64, 33), (0, 1), (5, 2), (32, 1)]


@pytest.mark.parametrize("kv_type, tolerance", [("f32", EXACT), ("f16", HALF)])
def test_batch_of_prefill_and_decode(kv_type, tolerance):
    example = Example(MIXED)
    cache = example.cache(kv_type=kv_type)
    out, present = example.expected()
    close(example.run(cache), out, tolerance)
    for s, expected in enumerate(present):
        for got, want in zip(cache.read(s), expected):
            close(got, want, EXACT if kv_type == "f32" else HALF)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    before = numba.get_num_threads()
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"this machine runs {numba.config.NUMBA_NUM_THREADS} threads")
    numba.set_num_threads(threads)
    try:
        for kv_heads in (1, 3):  # one KV head: several ranges of pages, merged
            example = Example([(1400, 1), (300, 120)], heads=3 * kv_heads, kv_heads=kv_heads)
            close(example.run(example.cache()), example.expected()[0])
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("heads, kv_heads, head_dim", [(1, 1, 16), (3, 1, 80), (8, 1, 96), (4, 4, 128), (14, 2, 64), (6, 2, 48)])
@pytest.mark.parametrize("kv_type, tolerance", [("f32", EXACT), ("f16", HALF)])
def test_shapes(heads, kv_heads, head_dim, kv_type, tolerance):
    example = Example([(200, 1), (70, 150)], heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    close(example.run(example.cache(kv_type=kv_type)), example.expected()[0], tolerance)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 511, 512, 513, 1025])
def test_lengths(length):
    example = Example([(length - 1, 1), (0, length)])
    close(example.run(example.cache()), example.expected()[0])


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100, 128, 129, 5000])
def test_window(window):
    example = Example([(300, 1), (95, 1), (96, 1), (0, 290), (127, 70)], window=window)
    close(example.run(example.cache()), example.expected()[0])


def test_large_scores_do_not_overflow():
    """Scores of several hundred: only differences from the maximum may be exponentiated."""
    example = Example([(600, 1), (0, 200)], scale=60.0)
    close(example.run(example.cache()), example.expected()[0], 2e-3)  # the softmax multiplies score errors of 1e-5 of hundreds


def test_unused_memory_may_hold_anything():
    example = Example([(37, 1), (5, 44)])
    cache = example.cache()
    for pool, tokens in ((cache.k, 2), (cache.v, 1)):
        used = np.zeros((len(pool), PAGE), bool)
        for s, (past, _) in enumerate(example.sequences):
            used[cache.places(s, 0, past)] = True
        np.moveaxis(pool, tokens, 1)[~used] = np.nan
    close(example.run(cache), example.expected()[0])


def test_chunked_prefill_is_one_prefill():
    tokens = 150
    example = Example([(0, tokens)])
    whole = example.run(example.cache())
    parts, key, value = [], example.keys[0], example.values[0]
    for start, stop in ((0, 7), (7, 8), (8, 100), (100, tokens)):
        rows = slice(start, stop)
        cache = PagedCache([key], [value], [stop - start])
        parts.append(attend(cache, example.q[rows], example.k[rows], example.v[rows], example.cos, example.sin, example.positions[rows],
                            **example.attributes))
        key, value = cache.read(0)
    close(np.concatenate(parts), whole)


def expected_of_pages(example, sequence, head, pages):
    """A decode step over the tokens of some pages, for the query heads of one KV head: [group, head_dim]."""
    about, last = example.attributes, example.sequences[sequence][0]
    key, value = example.expected()[1][sequence]
    tokens = [t for t in range(last + 1) if t // PAGE in pages and (not about["window"] or t > last - about["window"])]
    q = example.q[[sequence]].reshape(1, about["num_heads"], -1)
    position = example.positions[[sequence]]
    q = rotate(q, example.cos[position], example.sin[position]).reshape(about["kv_heads"], -1, about["head_dim"])[head]
    scores = q.astype(np.float64) @ key[head, tokens].T * about["scale"]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ value[head, tokens]


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("kv_type, tolerance", [("f32", EXACT), ("f16", HALF)])
def test_selected_pages(kv_type, tolerance, window):
    """Decode reads the listed pages only: any number of them, different for each KV head, the last one partly filled."""
    example = Example([(300, 1), (95, 1), (32, 1), (1200, 1)], window=window)
    rng = np.random.default_rng()
    pages, counts = np.zeros((4, 2, 40), np.int32), np.zeros((4, 2), np.int32)
    for s, (past, _) in enumerate(example.sequences):
        last = past // PAGE
        for h in range(2):
            chosen = np.union1d(rng.choice(last + 1, rng.integers(1, last + 2), replace=False), [last])
            counts[s, h] = len(chosen)
            pages[s, h, :len(chosen)] = chosen
    out = example.run(example.cache(kv_type=kv_type), (pages, counts)).reshape(4, 2, 2, -1)
    for s in range(4):
        for h in range(2):
            close(out[s, h], expected_of_pages(example, s, h, pages[s, h, :counts[s, h]]), tolerance)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_head_selects_far_more(threads):
    """Room for partial results follows the head with most pages, of which all heads get as many ranges."""
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"this machine runs {numba.config.NUMBA_NUM_THREADS} threads")
    example = Example([(1500, 1)], heads=8, kv_heads=8)
    pages, counts = np.zeros((1, 8, 100), np.int32), np.ones((1, 8), np.int32)
    pages[:, :, 0], counts[0, 5] = 1500 // PAGE, 1500 // PAGE + 1
    pages[0, 5, :counts[0, 5]] = np.arange(counts[0, 5])
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        out = example.run(example.cache(), (pages, counts)).reshape(8, 1, -1)
    finally:
        numba.set_num_threads(before)
    for h in range(8):
        close(out[h], expected_of_pages(example, 0, h, pages[0, h, :counts[0, h]]))


def test_selection_is_for_decode_only():
    example = Example([(100, 20), (50, 1)])
    pages, counts = np.zeros((2, 2, 4), np.int32), np.ones((2, 2), np.int32)
    pages[1, :, :2], counts[1] = [0, 1], 2  # all pages of the decoding sequence
    close(example.run(example.cache(), (pages, counts)), example.expected()[0])
