"""CUDA kernels of the cache, of attention and of page selection against their references, on fresh random inputs."""
import os

import numpy as np
import pytest
from cuda_device import needs_cuda

from edgeattn.kernels_cuda import select_pages
from edgeattn.ops import load_kernel
from edgeattn.page_formats import PAGE, PageFormat
from edgeattn.reference.cached_attention import rotate
from edgeattn.verification.cases import CASES

pytestmark = needs_cuda
EMULATED = bool(os.environ.get("EDGEATTN_EMULATE_CUDA"))
NAMES = "seal_pages", "read_pages", "cached_attention", "select_pages"


@pytest.mark.parametrize("name, case", [pytest.param(n, c, id=f"{n}-{c[0]}") for n in NAMES for c in CASES[n]])
def test_kernel_matches_reference(name, case):
    _, build, tolerance = case
    args, attributes = build(np.random.default_rng())
    if attributes.get("score", "bound") not in select_pages.SCORES:
        with pytest.raises(ValueError, match="run with --device cpu"):
            load_kernel(name, "cuda")(*args, **attributes)
        return
    expected = load_kernel(name, "reference")(*args, **attributes)
    for g, e in zip(load_kernel(name, "cuda")(*args, **attributes), expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=tolerance)


class Case:
    """Sequences with sealed pages in the middle, and a step of `new` tokens each; call() compares it with float64 on what the pages
    hold."""

    def __init__(self, types, head_dim, group, lengths, new, *, kv_heads=2, window=0, capacity=0, probes=0, seed=None, **form):
        from edgeattn.kernels_cuda.paged_cache import PagedCache
        rng, k_type, v_type = np.random.default_rng(seed), *(types.split("/") * 2)[:2]
        floats = "f32" if types == "f32" else "f16"
        formats = [PageFormat(head_dim, floats, floats)] + ([] if types == floats else [PageFormat(head_dim, k_type, v_type, **form)])
        self.rng, self.cache, self.new, self.lengths = rng, PagedCache(formats, kv_heads, lengths, new, capacity, probes), new, lengths
        for s, length in enumerate(lengths):
            self.cache.fill(s, *rng.standard_normal((2, kv_heads, length, head_dim), np.float32))
            if len(formats) > 1 and length // PAGE > 2:
                self.cache.seal(s, 1, length // PAGE - 1)
        heads, tokens = kv_heads * group, sum(new)
        self.q, self.k, self.v = (rng.standard_normal((tokens, n * head_dim), np.float32) for n in (heads, kv_heads, kv_heads))
        turns = np.arange(max(lengths) + max(new))[:, None] / 10000 ** (np.arange(head_dim // 2) / (head_dim // 2))
        self.cos, self.sin = np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)
        self.positions = np.concatenate([np.arange(a, a + n) for a, n in zip(lengths, new)])
        self.means = None  # [sequences, kv_heads, 1 + 2 * head_dim]: what stands for dropped tokens
        self.about = dict(num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=head_dim, scale=head_dim ** -0.5, window=window)

    def call(self, tolerance, reads=None, **options):
        """reads: (sequence, head) -> bool [slots], what may be read there besides what is causal."""
        from edgeattn.kernels_cuda.cached_attention import attend
        got = attend(self.cache, self.q, self.k, self.v, self.cos, self.sin, self.positions, **self.about, **options)
        expected = self.expected(reads)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)
        return np.linalg.norm(got - expected) / np.linalg.norm(expected)

    def weights(self, reads=None):
        """Of each sequence the softmax weights [kv_heads, group, new, slots], and the values. What stands for dropped tokens is one
        more slot."""
        about, row = self.about, 0
        heads, kv_heads, depth = about["num_heads"], about["kv_heads"], about["head_dim"]
        for s, (length, n) in enumerate(zip(self.lengths, self.new)):
            k, v = (x.astype(np.float64) for x in self.cache.read(s))
            at = self.positions[row:row + n]
            q = rotate(self.q[row:row + n].reshape(n, heads, depth), self.cos[at], self.sin[at]).astype(np.float64)
            scores = np.einsum("thgd,hsd->hgts", q.reshape(n, kv_heads, -1, depth), k) * about["scale"]
            distance = (length + np.arange(n))[:, None] - np.arange(length + n)
            hidden = (distance < 0) | ((distance >= about["window"]) if about["window"] else False)
            scores[:, :, hidden] = -np.inf
            entries = self.cache.entries[s]
            for h in range(kv_heads):
                scores[h][..., np.repeat(entries[h] < 0, PAGE)[:length + n]] = -np.inf
                if reads:
                    scores[h][..., ~reads(s, h)] = -np.inf
            if self.means is not None:
                count, key, value = self.means[s, :, 0], self.means[s, :, 1:1 + depth], self.means[s, :, 1 + depth:]
                own = np.einsum("thgd,hd->hgt", q.reshape(n, kv_heads, -1, depth), key) * about["scale"]
                own += np.where(count > 0, np.log(np.maximum(count, 1)), -np.inf)[:, None, None]
                scores, v = np.concatenate([scores, own[..., None]], 3), np.concatenate([v, value[:, None]], 1)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            yield weights / weights.sum(-1, keepdims=True), v
            row += n

    def expected(self, reads=None):
        found = self.weights(reads)
        return np.concatenate([np.einsum("hgts,hsd->thgd", *each).reshape(each[0].shape[2], -1) for each in found])


HALVES = 2e-3  # q, weights and their products with steps are rounded to halves; values are of size 1, sums of many of them smaller
TYPES = ["f16", "int4", "int8", "int3", "int2", "int8/int4", "int4/int2", "int3/int8"]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("types", TYPES)
def test_decode_reads_pages_as_they_are(types, head_dim):
    """Sequences of many lengths, one of them new, in one batch."""
    rng = np.random.default_rng()
    group, lengths = int(rng.integers(1, 9)), [0, *(int(x) for x in rng.integers(1, 1000, 5)), 1500]
    print(group, lengths)
    Case(types, head_dim, group, lengths, [1] * len(lengths)).call(2 * HALVES)


@pytest.mark.parametrize("group", range(1, 9))
def test_decode_takes_any_group(group):
    Case("int4", 128, group, [700], [1], kv_heads=3).call(2 * HALVES)
    Case("f16", 128, group, [1000], [1], kv_heads=3).call(HALVES)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("types, head_dim", [("f16", 128), ("f16", 64), ("int4", 128), ("int4", 64)])
def test_every_way_to_merge(monkeypatch, together, types, head_dim):
    """Sequences of one range, of a few and of many, with tokens that were dropped and without; twice the same, to the bit."""
    from edgeattn.kernels_cuda import attention_call, cached_attention, device
    rng = np.random.default_rng()
    if EMULATED:  # with few processors there would be few ranges
        monkeypatch.setattr(attention_call, "attribute", lambda name: 64)
    case = Case(types, head_dim, int(rng.integers(1, 9)), [0, 40, 700, int(rng.integers(1500, 3000))], [1] * 4)
    monkeypatch.setattr(cached_attention, "gangs_at_once", lambda launch: 8 if together else 7)
    case.call(2 * HALVES)
    xp = device.cupy()
    dropped = xp.asarray(rng.standard_normal((4, 2, 1 + 2 * head_dim), np.float32))
    dropped[:, :, 0] = xp.asarray([[0, 30]] + [[30, 5]] * 3)  # tokens; none of one head
    case.means = dropped.get()
    extra = {"batch.compensation": (held := xp.asarray([dropped[s].data.ptr for s in range(4)], np.int64)).data.ptr}
    found = [cached_attention.attend(case.cache, case.q, case.k, case.v, case.cos, case.sin, case.positions, **case.about, extra=extra)
             for _ in range(2)]
    assert np.array_equal(*found) and held.size
    np.testing.assert_allclose(found[0], case.expected(), rtol=0, atol=2 * HALVES)
    turns = case.cache.exchange.get()[:4 * 8].view(np.uint32)
    assert turns.tolist() == ([2, 2, 2, 2, 3, 3, 3, 3] if together else [0] * 8)  # of few pages one range has all


@pytest.mark.parametrize("sequences, at_once, grid, together", [
    (1, 8, (32, 8, 1), True), (1, 7, (32, 8, 1), False), (4, 32, (8, 8, 4), True), (5, 40, (6, 8, 5), False)])
def test_who_merges_is_what_the_device_holds(monkeypatch, sequences, at_once, grid, together):
    """Of an H200's size."""
    from edgeattn.kernels_cuda import attention_call, cached_attention, device
    for asking in (attention_call, cached_attention):
        monkeypatch.setattr(asking, "attribute", {"MultiProcessorCount": 132, "MaxSharedMemoryPerMultiprocessor": 228 << 10}.__getitem__)
    monkeypatch.setattr(cached_attention, "gangs_at_once", lambda launch: at_once)
    case = Case("int4", 128, 4, [1500] * sequences, [1] * sequences, kv_heads=8)
    tensors = {name: device.cupy().asarray(x) for name, x in dict(q=case.q, k=case.k, v=case.v, cos=case.cos, sin=case.sin,
                                                                  out=case.q).items()}
    decode = case.cache.launches(cached_attention, tensors, case.about, {"batch.positions": 0})[0]
    assert (decode.grid, decode.gang, decode.args[-2] != 0) == (grid, grid[0] if together else 1, together)


def test_words_of_gangs_do_not_meet():
    """However a launch is cut: gang n has at most as many blocks as a launch of n gangs gives each."""
    from edgeattn.kernels_cuda import exchange
    for blocks in (8, 16, 96, 264, 296):
        places = np.zeros((exchange.nbytes(blocks) - 4 * exchange.MOST_GANGS) // 8, int)
        rows = len(places) - blocks // 2 * exchange.MOST_SCORES
        for gang in range(blocks // 2):
            power = (gang + 1).bit_length() - 1
            first = (power * blocks + (gang + 1 - (1 << power)) * (blocks >> power)) * exchange.TOLD
            places[first:first + blocks // (gang + 1) * exchange.TOLD] += 1
        assert places.max() == 1 and not places[rows:].any() and rows == blocks * (blocks // 2).bit_length() * exchange.TOLD


@pytest.mark.parametrize("types", ["f16", "int4", "f32"])
@pytest.mark.parametrize("window", [1, 50, 333])
def test_window(types, window):
    Case(types, 64, 4, [500, 31, 32], [1, 1, 1], window=window).call(2 * HALVES)
    Case(types, 64, 4, [500, 31, 0], [40, 1, 77], window=window).call(2 * HALVES)


@pytest.mark.parametrize("types", ["f16", "int4", "int8/int2", "f32"])
def test_released_pages_leave_nothing(types):
    case = Case(types, 128, 4, [900, 40], [1, 1])
    case.cache.entries[0, :, [2, 3, 7, 20]] = -1
    case.cache.entries[0, 1, 9:17] = -1
    case.cache.tables.set(case.cache.entries)
    case.call(2 * HALVES)


@pytest.mark.parametrize("types", ["f16", "int4", "int3/int8", "f32"])
def test_decode_reads_lists(types):
    case = Case(types, 128, 4, [3000, 2000, 100], [1, 1, 1], capacity=40)
    pages, counts, kept = np.zeros((3, 2, 40), np.int32), np.full((3, 2), -1, np.int32), {}
    for s, h in np.ndindex(2, 2):
        total = -(-case.cache.lengths[s] // PAGE)
        chosen = np.sort(np.r_[case.rng.permutation(total - 1)[:case.rng.integers(0, 39)], total - 1])
        pages[s, h, :len(chosen)], counts[s, h] = chosen, len(chosen)
        kept[s, h] = np.isin(np.arange(case.cache.lengths[s]) // PAGE, chosen)
    case.cache.select(pages, counts)
    case.call(4 * HALVES, lambda s, h: kept.get((s, h), np.ones(case.cache.lengths[s], bool)))


@pytest.mark.parametrize("types, form", [
    ("int4", dict(k_axis="token")), ("int8/int3", dict(k_axis="token")), ("int3", dict(k_axis="token", one_group=True)),
    ("int2/int4", dict(separated=True)), ("delta/int4", dict(threshold=1.0)), ("f32", {}), ("delta/f16", dict(threshold=2.0, gate=8))])
@pytest.mark.parametrize("head_dim", [16, 48, 80, 128, 256])
def test_other_formats(types, form, head_dim):
    """In float32, what tensor cores do not take."""
    Case(types, head_dim, 3, [300, 0, 70], [1, 5, 1], **form).call(1e-4)
    Case(types, head_dim, 11, [200], [1], **form).call(1e-4)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("types", ["f16", "int4", "int8", "int3/int2"])
@pytest.mark.parametrize("processors", [1, 1000])
def test_prefill_behind_pages(monkeypatch, processors, types, head_dim):
    """Prompts of several lengths behind cached tokens, and decode, in one batch, in blocks of many rows and of few."""
    monkeypatch.setattr("edgeattn.kernels_cuda.cached_attention.processors", lambda: processors)
    rng = np.random.default_rng()
    group = int(rng.integers(1, 9))
    print(group)
    Case(types, head_dim, group, [0, 500, 37, 900], [300, 129, 1, 64]).call(3 * HALVES)


@pytest.mark.parametrize("types, head_dim", [("f16", 64), ("int4", 128), ("int8/int2", 64), ("int4", 80), ("f32", 64)])
@pytest.mark.parametrize("new", [(1, 1, 1), (300, 1, 70)], ids=["decode", "prompts"])
def test_one_token_stands_for_what_was_dropped(types, head_dim, new):
    """In both KV heads of the first sequence, where it hardly matters or decides, and in one of the last."""
    from edgeattn.kernels_cuda import device
    case = Case(types, head_dim, int(np.random.default_rng().integers(1, 9)), [400, 37, 900], list(new))
    case.means = np.zeros((3, 2, 1 + 2 * head_dim), np.float32)
    case.means[[0, 0, 2], [0, 1, 1]] = case.rng.standard_normal((3, 1 + 2 * head_dim))
    case.means[[0, 0, 2], [0, 1, 1], 0] = 32, 70_000, 700
    held = device.cupy().asarray(case.means)
    rows = device.cupy().asarray([held.data.ptr, 0, held.data.ptr + 2 * case.means[0].nbytes], np.int64)
    case.call(1e-4 if types == "f32" or head_dim == 80 else 3 * HALVES, extra={"batch.compensation": rows.data.ptr})


SUM, LAST = 1, 2  # bits of mass_mode


@pytest.mark.parametrize("types, head_dim, window, form, mode", [
    ("f16", 64, 0, {}, SUM), ("f16", 64, 0, {}, LAST), ("int4", 128, 0, {}, SUM | LAST), ("int8/int2", 64, 70, {}, SUM),
    ("int4", 80, 0, dict(k_axis="token"), SUM | LAST), ("f32", 256, 50, {}, LAST)])
def test_mass_is_the_attention_received(types, head_dim, window, form, mode):
    rng = np.random.default_rng()
    group, probes = int(rng.integers(1, 12)), int(rng.integers(1, 50))
    print(group, probes)
    check_mass(types, head_dim, window, form, mode, group, probes)


def check_mass(types, head_dim, window, form, mode, group, probes):
    """Of prompts behind cached tokens, decode and a new sequence in one call, added to what was there; released pages receive nothing."""
    rng = np.random.default_rng()
    case = Case(types, head_dim, group, [0, 300, 37, 400], [70, 1, 33, 40], window=window, probes=probes, **form)
    case.cache.entries[3, 1, [2, 3, 7]] = -1
    case.cache.tables.set(case.cache.entries)
    used = np.arange(case.cache.mass.shape[-1]) < np.array(case.cache.lengths)[:, None] - np.array(case.new)[:, None]
    before = rng.random(case.cache.mass.shape, np.float32) * used[:, None, None]
    case.cache.mass.set(before)
    case.call(3 * HALVES, extra={"cache.mass_mode": mode})
    got, last = case.cache.mass.get(), 2 if mode & SUM else 0
    for s, (weights, _) in enumerate(case.weights()):
        newest, slots = weights[:, :, -probes:], slice(weights.shape[-1])
        rows = np.arange(case.new[s])[-probes:, None] + case.lengths[s]
        seen = (np.arange(slots.stop) <= rows) & (np.arange(slots.stop) > rows - (window or np.inf))
        expected = before[s].astype(np.float64)
        if mode & SUM:
            expected[0, :, slots] += newest.sum((1, 2))
            expected[1, :, slots] += seen.sum(0)
        if mode & LAST:
            expected[last, :, slots] = newest.sum((1, 2))
        np.testing.assert_allclose(got[s], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("types", ["f16", "int4"])
def test_a_launch_serves_every_call_that_fits_its_bucket(types):
    """The launches of 4 sequences, captured in a graph, with fewer ones and other lengths; a step's result does not depend on the one
    before."""
    from edgeattn.kernels_cuda import cached_attention, device, steps
    xp, case = device.cupy(), Case(types, 128, 4, [900, 33, 1200, 5], [1] * 4)
    tensors = {name: xp.asarray(x) for name, x in dict(q=case.q, k=case.k, v=case.v, cos=case.cos, sin=case.sin).items()}
    tensors["out"], positions = xp.full(case.q.shape, np.nan, np.float32), xp.asarray(case.positions)
    graph = steps.Graph(case.cache.launches(cached_attention, tensors, case.about, {"batch.positions": positions.data.ptr}))
    expected = None
    for sequences in (4, 2, 3, 4):
        case.cache.state.set(np.array([sequences, 0, sequences, 0]))
        tensors["out"].fill(np.nan)
        xp.cuda.Device().synchronize()
        graph.launch()
        graph.stream.synchronize()
        out = tensors["out"].get()
        expected = case.expected(None) if expected is None else expected
        np.testing.assert_allclose(out[:sequences], expected[:sequences], rtol=0, atol=2 * HALVES)
        assert np.isnan(out[sequences:]).all()
