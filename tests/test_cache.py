"""Pages and page lists: references, copy-on-write, limits, sealing, bytes."""
import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.cache.pages import CacheFull, PagePool
from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.page_formats import BITS, PAGE, PageFormat
from edgeattn.reference.seal_pages import seal_pages
from kv_driver import dequantise, page_bytes

TYPES = ("int8", "int4", "int3", "int2")


def small(kv_type="f32", v_type=None, tokens=256, *, layers=2, kv_heads=1, head_dim=16, ubatch=256, **options):
    options = CacheOptions(k_type=kv_type, v_type=v_type or kv_type, **{"window": 32} | options)
    return KVCache(layers, kv_heads, head_dim, tokens, options, ubatch)


def used(cache):
    return sum(pool.used for pool in cache.pools)


def write(cache, sequence, k, v):
    """Append tokens and put k, v [tokens, layers, kv_heads, head_dim] into their places, which must be the sequence's alone."""
    cache.append(sequence, len(k))
    pool, kind = cache.pools[0], np.float32 if cache.options.float_type == "f32" else np.float16
    keys = pool.pages.k.view(kind).reshape(-1, cache.head_dim, PAGE)
    values = pool.pages.v.view(kind).reshape(-1, PAGE, pool.format.width)
    for layer, head in np.ndindex(cache.shape):
        slots = sequence.counts[layer, head] - len(k) + np.arange(len(k))
        entries = sequence.tables[layer, head, slots // PAGE]
        assert (entries >= 0).all() and (entries % POOLS == 0).all() and (pool.references[entries // POOLS] == 1).all()
        keys[entries // POOLS, :, slots % PAGE] = k[:, layer, head]
        values[entries // POOLS, slots % PAGE, :cache.head_dim] = v[:, layer, head]


def grow(cache, sequence, tokens, chunk=None):
    """Append random tokens, settling after each chunk. -> k, v as in `write`."""
    k, v = np.random.default_rng().standard_normal((2, tokens, *cache.shape, cache.head_dim), np.float32)
    append_all(cache, sequence, k, v, chunk or cache.plan.chunk)
    return k, v


def append_all(cache, sequence, k, v, chunk):
    for start in range(0, len(k), chunk):
        write(cache, sequence, k[start:start + chunk], v[start:start + chunk])
        cache.settle(sequence, min(chunk, len(k) - start))


def test_pool():
    pool = PagePool(PageFormat(16, "int4", "int4"), 5)
    first = pool.allocate(3)
    assert sorted(first) == [0, 1, 2] and (pool.used, pool.free, pool.used_bytes) == (3, 2, 3 * pool.format.page_bytes)
    pool.share(first[:1])
    pool.release(first)
    assert pool.used == 1 and pool.references.tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(CacheFull, match="5 pages are needed, 4 of 5 are free"):
        pool.allocate(5)
    rest = pool.allocate(4)
    assert sorted([*rest, first[0]]) == [0, 1, 2, 3, 4]
    for array in pool.pages.arrays().values():
        array[:] = np.random.default_rng().integers(0, 200, array.shape)
    pool.copy(rest[:2], rest[2:])
    assert all((array[rest[:2]] == array[rest[2:]]).all() for array in pool.pages.arrays().values())


def test_fork_copies_only_the_page_it_writes():
    cache = small()
    a = cache.new_sequence()
    k, _ = grow(cache, a, 40)
    b = cache.fork(a)
    assert used(cache) == 4  # two layers, two pages each
    grow(cache, b, 1)
    assert (a.tables[..., 0] == b.tables[..., 0]).all() and (a.tables[..., 1] != b.tables[..., 1]).all() and used(cache) == 6
    np.testing.assert_array_equal(cache.read(b, 1, 0)[0][:40], k[:, 1, 0])
    grow(cache, a, 1)  # its last page is no longer shared: written in place
    assert used(cache) == 6


def test_full_cache_says_so_and_changes_nothing():
    cache = small(tokens=64)
    a = cache.new_sequence()
    grow(cache, a, 62)
    before = {name: array.copy() for name, array in a.arrays.items()}
    with pytest.raises(CacheFull, match="--ctx-size"):
        cache.append(a, 3)
    assert (a.length, a.room) == (62, 2) and all((before[name] == array).all() for name, array in a.arrays.items())


def test_full_pool_says_so_and_changes_nothing():
    """Many forks are more than the cache holds: the pages run out, not the context."""
    cache = small(tokens=128)
    a = cache.new_sequence()
    grow(cache, a, 100)
    forks = [cache.fork(a) for _ in range(10)]
    with pytest.raises(CacheFull, match="pages are needed"):
        for last in forks:
            before = [array.copy() for array in (last.tables, last.counts, *(pool.references for pool in cache.pools))], last.length
            grow(cache, last, 28)
    after = [last.tables, last.counts, *(pool.references for pool in cache.pools)], last.length
    assert before[1] == after[1] and all((x == y).all() for x, y in zip(before[0], after[0]))


def test_forgotten_sequences_give_their_pages_back():
    cache = small("int4", tokens=512)
    a = cache.new_sequence()
    grow(cache, a, 150)
    one = used(cache)
    b = cache.fork(a)
    assert used(cache) == one and cache.used_bytes == sum(p.used_bytes for p in cache.pools) + a.nbytes + b.nbytes
    grow(cache, b, 100)
    del a
    assert used(cache) == sum(map(len, page_bytes(cache, b))) + 2
    cache.truncate(b, 0)
    assert used(cache) == 0 and (b.length, b.counts.any(), (b.tables == RELEASED).all()) == (0, False, True)
    del b
    assert cache.used_bytes == 0 and not any(pool.references.any() for pool in cache.pools)


def test_appending_after_a_cut_leaves_forks_alone():
    """A page that was full when it was shared is written again once its owner is cut back into it."""
    cache = small()
    a = cache.new_sequence()
    k, _ = grow(cache, a, 40)
    b = cache.fork(a)
    for length in (40, 20):
        cache.truncate(a, length)
        grow(cache, a, 1)
    np.testing.assert_array_equal(cache.read(b, 0, 0)[0], k[:, 0, 0])


def test_truncate_keeps_quantised_pages_whole():
    cache = small("int4")
    a = cache.new_sequence()
    grow(cache, a, 200)  # pages 1 ... 4 are quantised: 160 to 199 are floats
    assert (a.sealed == 5).all()
    assert [cache.truncate(a, n) for n in (199, 161, 160, 159, 100, 96, 40, 31, 5)] == [199, 161, 160, 128, 96, 96, 32, 31, 5]


@pytest.mark.parametrize("given, word", [({"k_type": "int1"}, "int1"), ({"storage": "zip"}, "kivi"), ({"window": 40}, "32"),
                                         ({"k_type": "f32", "v_type": "int4"}, "f32"), ({"sink_tokens": 33}, "32"),
                                         ({"eviction": "h2o"}, "--kv-budget")])
def test_wrong_options_are_named(given, word):
    with pytest.raises(ValueError, match=word):
        CacheOptions(**given)


@pytest.mark.parametrize("kv_type", [("int4", "int4"), ("int2", "int3"), ("f16", "int4"), ("int8", "f16")])
@pytest.mark.parametrize("storage", ["kivi", "hadamard", "bitnet"])
def test_chunks_do_not_change_pages(kv_type, storage):
    rng, tokens = np.random.default_rng(), 310
    cache = small(*kv_type, tokens=1024, kv_heads=2, storage=storage, ubatch=512)
    k, v = rng.standard_normal((2, tokens, *cache.shape, cache.head_dim), np.float32)
    whole = cache.new_sequence()
    append_all(cache, whole, k, v, tokens)
    for chunk in (1, 32, int(rng.integers(2, tokens))):
        parts = cache.new_sequence()
        append_all(cache, parts, k, v, chunk)
        cache.settle(parts, tokens)
        assert (parts.sealed == whole.sealed).all() and page_bytes(cache, parts) == page_bytes(cache, whole)
    assert (whole.sealed == (tokens - 32) // PAGE).all()  # the first page and the window stay floats


def bytes_of(cache, bits_k, bits_v):
    """Closed form of KIVI's page, all heads: K 32 codes and two halves a channel, V head_dim codes and two halves a block, by token."""
    blocks = -(-cache.head_dim // 32)
    k = cache.head_dim * 4 * bits_k + (4 * cache.head_dim if bits_k < 16 else 0)
    v = blocks * 32 * 4 * bits_v + (PAGE * 4 * blocks if bits_v < 16 else 0)
    return np.prod(cache.shape) * (k + v)


@pytest.mark.parametrize("k_type, v_type", [("f16", "f16"), *((t, t) for t in TYPES), ("int4", "f16"), ("f16", "int2"), ("int8", "int3")])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_stored_bytes(k_type, v_type, head_dim):
    tokens = 4096
    cache = small(k_type, v_type, tokens, head_dim=head_dim, ubatch=tokens)
    a = cache.new_sequence()
    cache.append(a, tokens)
    cache.settle(a, tokens)
    floats, codes = bytes_of(cache, 16, 16), bytes_of(cache, BITS[k_type], BITS[v_type])
    kept = 2 if cache.options.quantised else tokens // PAGE  # pages of floats: the first, and the window
    assert cache.stored_bytes(a) == kept * floats + (tokens // PAGE - kept) * codes
    assert cache.stored_bytes(a) == cache.used_bytes - a.nbytes


@pytest.mark.parametrize("storage, kv_type", [("kivi", "f16"), *((name, kind) for name in ("kivi", "zipcache") for kind in TYPES)])
def test_read_bytes_are_the_stored_ones(kv_type, storage):
    cache = small(kv_type, tokens=1024, storage=storage, window=64, ubatch=1024)
    group = cache.storage.group if cache.options.quantised else 1
    for pages in (1, 2, 3, 3 + group, 3 + 5 * group):
        a = cache.new_sequence()
        cache.append(a, pages * PAGE)
        cache.settle(a, pages * PAGE)
        assert cache.read_bytes(pages * PAGE) == pytest.approx(cache.stored_bytes(a))
        cache.truncate(a, 0)


class Sharing(RuleBasedStateMachine):
    """Random appends, settlements, forks, truncations and frees: every page's references equal its holders, contents never leak, and
    a sealed page never changes."""

    def __init__(self):
        super().__init__()
        self.held = []  # [sequence, its tokens' k, v]

    @initialize(kind=st.sampled_from([("f32", "f32"), ("f16", "f16"), ("int4", "int4"), ("int2", "f16"), ("f16", "int3")]))
    def make(self, kind):
        self.cache = small(*kind, tokens=320, layers=1, kv_heads=2)

        self.held.append([self.cache.new_sequence(), *np.zeros((2, 0, *self.cache.shape, 16), np.float32)])

    @rule(i=st.integers(0, 2), count=st.integers(1, 90) | st.just(1), settle=st.booleans())
    def append(self, i, count, settle):
        held = self.held[i % len(self.held)]
        k, v = np.random.default_rng().standard_normal((2, count, *self.cache.shape, 16), np.float32)
        try:
            write(self.cache, held[0], k, v)
        except CacheFull:
            return
        held[1:] = np.concatenate([held[1], k]), np.concatenate([held[2], v])
        if settle:
            self.cache.settle(held[0], count)

    @rule(i=st.integers(0, 2))
    def settle(self, i):
        sequence = self.held[i % len(self.held)][0]
        self.cache.settle(sequence, 2)
        if len(self.cache.pools) > 1:
            assert (sequence.sealed >= (sequence.counts - 32) // PAGE).all() or self.cache.pools[1].free < 2 * sequence.counts.max() // PAGE

    @precondition(lambda self: len(self.held) < 3)
    @rule(i=st.integers(0, 2))
    def fork(self, i):
        sequence, k, v = self.held[i % len(self.held)]
        self.held.append([self.cache.fork(sequence), k, v])

    @rule(i=st.integers(0, 2), keep=st.floats(0, 1))
    def truncate(self, i, keep):
        held = self.held[i % len(self.held)]
        wanted, inside = int(keep * held[0].length), held[0].sealed.max() * PAGE
        length = self.cache.truncate(held[0], wanted)
        assert length == held[0].length == (wanted // PAGE * PAGE if PAGE <= wanted < inside else wanted)
        held[1:] = held[1][:length], held[2][:length]

    @precondition(lambda self: len(self.held) > 1)
    @rule(i=st.integers(0, 2))
    def forget(self, i):
        del self.held[i % len(self.held)]

    @invariant()
    def references_match_holders(self):
        entries = np.concatenate([np.zeros(0, int), *(held[0].tables.ravel() for held in self.held)])
        for i, pool in enumerate(self.cache.pools):
            holders = np.bincount(entries[(entries >= 0) & (entries % POOLS == i)] // POOLS, minlength=len(pool.references))
            np.testing.assert_array_equal(holders, pool.references)
            assert pool.used == np.count_nonzero(holders)
        assert self.cache.used_bytes == sum(p.used_bytes for p in self.cache.pools) + sum(held[0].nbytes for held in self.held)

    @invariant()
    def pages_hold_their_tokens(self):
        kind = np.float32 if self.cache.options.float_type == "f32" else np.float16
        for sequence, k, v in self.held:
            assert (sequence.counts == len(k)).all() and sequence.length == len(k)
            for layer, head in np.ndindex(self.cache.shape):
                pages = -(-len(k) // PAGE)
                entries, sealed = sequence.tables[layer, head], min(sequence.sealed[layer, head], pages)
                assert (entries[:pages] >= 0).all() and (entries[pages:] == RELEASED).all()
                assert (entries[1:sealed] % POOLS == 1).all() and (entries[max(1, sealed):pages] % POOLS == 0).all()
                rounded = [x[:, layer, head].astype(kind) for x in (k, v)]
                for got, given in zip(dequantise(self.cache, sequence, layer, head), rounded):
                    floats = np.r_[:min(PAGE, len(k)), max(1, sealed) * PAGE:len(k)].astype(int)
                    np.testing.assert_array_equal(got[floats], given[floats])
                for page in range(1, sealed):
                    self.check_sealed(entries[page], *(x[page * PAGE:(page + 1) * PAGE].astype(np.float32) for x in rounded))

    def check_sealed(self, entry, k, v):
        kinds = [kind if BITS[kind] < 16 else "int2" for kind in (self.cache.options.k_type, self.cache.options.v_type)]
        expected = seal_pages(k.T[None], v[None], k_type=kinds[0], v_type=kinds[1])
        got = [array[entry // POOLS] for array in self.cache.pools[1].pages.arrays().values()]
        for side, kind in ((0, self.cache.options.k_type), (2, self.cache.options.v_type)):
            if BITS[kind] < 16:
                np.testing.assert_array_equal(got[side], expected[side][0])
                np.testing.assert_array_equal(got[side + 1], expected[side + 1][0])


Sharing.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestSharing = Sharing.TestCase
