"""Attention over a KVCache: every page format, released pages, attention mass, the compensation token, against the reference."""
import numba
import numpy as np
import pytest

from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu.cached_attention import PagedCache, attend
from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.policies import load_policy, policy_names
from kv_driver import ROUNDED, Driver, dequantise, hadamard

TYPES = ["int8", "int4", "int3", "int2", "int4/f16", "f16/int4"]
HEAD_DIMS = [16, 48, 64, 80, 128]
FORMATS = [*((kind, name, depth) for kind in TYPES for name in ("kivi", "hadamard") for depth in HEAD_DIMS),
           *((kind, name, None) for kind in TYPES for name in policy_names("storage") if name not in ("kivi", "hadamard")),
           *((kind, "kivi", depth) for kind in ("f16", "f32") for depth in HEAD_DIMS)]  # None: a random one


def cache_of(types, *, tokens=1024, layers=1, kv_heads=2, head_dim=64, ubatch=256, classes=None, **options):
    k_type, v_type = (types.split("/") * 2)[:2]
    k_type = load_policy("storage", options.get("storage", "kivi")).keys or k_type
    options = CacheOptions(k_type=k_type, v_type=v_type, **{"window": 32, "delta_threshold": 3.0} | options)  # of random keys half
    return KVCache(layers, kv_heads, head_dim, tokens, options, ubatch, classes)


def with_threads(threads, call):
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip(f"this machine runs {numba.config.NUMBA_NUM_THREADS} threads")
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        call()
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("types, storage, head_dim", FORMATS)
def test_pages_are_read_as_they_are(types, storage, head_dim):
    """Prefill behind sealed pages, decode, and both in one batch."""
    rng = np.random.default_rng()
    group, chunk, head_dim = int(rng.integers(1, 9)), int(rng.integers(60, 200)), head_dim or int(rng.choice(HEAD_DIMS))
    print(f"group {group}, chunk {chunk}, head_dim {head_dim}")  # pytest shows it when the test fails
    cache = cache_of(types, head_dim=head_dim, storage=storage)
    driver = Driver(cache, group)
    a, b, c = (cache.new_sequence() for _ in range(3))
    driver.fill(a, 260, chunk, check=False)
    driver.fill(b, 226, check=False)
    driver.forward([(a, driver.random(1)), (c, driver.random(5)), (b, driver.random(47))])
    driver.forward([(a, driver.random(33))])
    driver.forward([(c, driver.random(1)), (a, driver.random(1)), (b, driver.random(1))])
    if cache.options.quantised:
        assert all(pool.used for pool in cache.pools)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("types", ["int4", "int8/int2"])
def test_long_contexts(types, group, threads):
    """Several chunks of scores, several ranges, threads."""
    storage, window = np.random.default_rng().choice(["kivi", "hadamard"]), int(np.random.default_rng().choice([0, 77, 700]))
    print(storage, window)
    cache = cache_of(types, tokens=2048, kv_heads=1, ubatch=2048, storage=storage)
    driver = Driver(cache, group, window=window)

    def run():
        a, b = cache.new_sequence(), cache.new_sequence()
        driver.fill(a, 1300, 1300, check=False)
        driver.fill(b, 130)
        driver.forward([(a, driver.random(1)), (b, driver.random(1))])
        driver.forward([(a, driver.random(33)), (b, driver.random(1))])
        cache.truncate(a, 0)
        cache.truncate(b, 0)
    with_threads(threads, run)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_leaves_scores_as_they_are(head_dim):
    rng, heads, kv_heads = np.random.default_rng(), 6, 2
    sequences = [(100, 1), (70, 35), (0, 40)]
    q, k, v = (rng.standard_normal((76, n * head_dim), np.float32) for n in (heads, kv_heads, kv_heads))
    keys, values = ([rng.standard_normal((kv_heads, past, head_dim), np.float32) for past, _ in sequences] for _ in "kv")
    turns = np.arange(200)[:, None] / 10000 ** (np.arange(head_dim // 2) / (head_dim // 2))
    cos, sin = np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)
    positions = np.concatenate([np.arange(past, past + new) for past, new in sequences])
    about = dict(num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=head_dim, scale=head_dim ** -0.5)
    plain, turned = (PagedCache(x, values, [new for _, new in sequences]) for x in (keys, [key @ hadamard(head_dim) for key in keys]))
    out = attend(turned, q, k, v, cos, sin, positions, keys_rotated=1, **about)
    np.testing.assert_allclose(out, attend(plain, q, k, v, cos, sin, positions, **about), rtol=0, atol=1e-5)
    for s in range(3):
        np.testing.assert_allclose(turned.read(s)[0] @ hadamard(head_dim), plain.read(s)[0], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(turned.read(s)[1], plain.read(s)[1])


def move_pages(cache, sequence):
    """The same sequence at other places of the pools."""
    for i, pool in enumerate(cache.pools):
        order = np.random.default_rng().permutation(len(pool.references))  # page n goes to order[n]
        for array in (*pool.pages.arrays().values(), pool.references):
            array[order] = array.copy()
        pool._free[:pool._top] = order[pool._free[:pool._top]]  # or the next page would be one that is in use now
        here = (sequence.tables != RELEASED) & (sequence.tables % POOLS == i)
        sequence.tables[here] = order[sequence.tables[here] // POOLS] * POOLS + i


@pytest.mark.parametrize("new", [1, 40])
@pytest.mark.parametrize("storage", policy_names("storage"))
def test_physical_places_do_not_matter(storage, new):
    cache = cache_of("int4", storage=storage)
    driver, a = Driver(cache), cache.new_sequence()
    driver.fill(a, 300)
    a.exact_from = 0  # the tokens to come are taken back, whatever was sorted before
    parts = driver.random(new)
    first = driver.forward([(a, parts)], settle=False)[0]
    assert cache.truncate(a, 300) == 300
    move_pages(cache, a)
    np.testing.assert_array_equal(driver.forward([(a, parts)], settle=False, check=False)[0], first)


@pytest.mark.parametrize("new", [1, 2, 150])
def test_released_pages_are_skipped(new):
    rng, cache = np.random.default_rng(), cache_of("int4", tokens=2048, kv_heads=3)
    driver, a = Driver(cache, 3), cache.new_sequence()
    driver.fill(a, 1500, check=False)
    for gone in (rng.choice(45, 20, replace=False), np.arange(0, 40), np.arange(46)):  # single ones, whole chunks, nearly all
        for head, pages in ((0, gone), (2, gone[::2])):
            cache.release(a.tables[0, head, pages])
            a.tables[0, head, pages] = RELEASED
        driver.forward([(a, driver.random(new))], settle=False)


def expected_mass(driver, sequence, queries, probes):
    """(mass, seen) [layers, kv_heads, slots] that the newest `probes` tokens leave; queries [layers, tokens, heads, head_dim]."""
    cache, found = driver.cache, np.zeros((2, *driver.cache.shape, sequence.counts.max()))
    for layer, head in np.ndindex(cache.shape):
        q = driver.rotated(queries[layer], sequence)[-probes:, head * driver.group:(head + 1) * driver.group]
        keys = dequantise(cache, sequence, layer, head)[0]
        weights = driver.weights(q, keys)
        found[0, layer, head, :len(keys)] = weights.sum((0, 1))
        found[1, layer, head, :len(keys)] = (weights > 0).any(1).sum(0)
    return found


@pytest.mark.parametrize("mode, types, options, window", [
    ("sum", "int4", {"storage": "zipcache"}, 0), ("sum", "int4", {"storage": "akvq"}, 0), ("sum", "int8", {"storage": "zipcache"}, 90),
    ("sum", "f16", {"eviction": "h2o", "budget": 450_000}, 0), ("last", "f32", {"eviction": "snapkv", "budget": 900_000}, 0),
    ("last", "int4", {"eviction": "tova", "budget": 250_000}, 0),
    ("sum, last", "int4", {"storage": "zipcache", "eviction": "snapkv", "budget": 400_000}, 0)])
def test_mass_is_the_attention_received(mode, types, options, window):
    """By token: tokens take their mass along when they are sorted into other pages."""
    cache = cache_of(types, layers=2, **options)
    driver, a = Driver(cache, 3, window=window), cache.new_sequence()
    mass, seen, last = np.zeros((3, *cache.shape, 1024))
    for count in (100, 33, 1, 1, 90, 1, 120, 2, 200, 77, 100, 1) * (2 if cache.plan.evicts else 1):
        count = min(count, cache.plan.chunk)
        parts, probes = driver.random(count), min(count, int(np.random.default_rng().integers(1, 50)))
        driver.forward([(a, parts)], settle=False, probes=probes)
        slots = a.counts.max()
        held = np.arange(slots) < a.counts[..., None]
        places, found = np.where(held, a.positions[..., :slots], 1023).astype(int), expected_mass(driver, a, parts[0], probes)
        last[:] = 0
        for total, part in ((mass, found[0]), (seen, found[1]), (last, found[0])):
            np.put_along_axis(total, places, np.take_along_axis(total, places, -1) + part, -1)
        planes = {"sum": [mass, seen], "last": [last], "sum, last": [mass, seen, last]}[mode]
        assert len(a.mass) == len(planes)
        for got, total in zip(a.mass, planes):
            error = abs(got[..., :slots] - np.take_along_axis(total, places, -1))[held].max()
            assert error < (1e-9 if total is seen else ROUNDED * total.max() if cache.options.quantised else 1e-4)
        cache.settle(a, count)
    assert (a.length > a.counts).all() == cache.plan.evicts


def test_mass_of_a_mixed_batch():
    cache = cache_of("int4", storage="zipcache")
    driver, sequences = Driver(cache), [cache.new_sequence() for _ in range(3)]
    for a in sequences[:2]:
        driver.fill(a, 70, probes=0)
    work = [(a, driver.random(n)) for a, n in zip(sequences, (1, 60, 20))]
    driver.forward(work, settle=False, probes=32)
    for a, parts in work:
        np.testing.assert_allclose(a.mass[..., :a.counts.max()], expected_mass(driver, a, parts[0], min(32, parts[0].shape[1])), atol=1e-5)
        assert not a.mass[..., a.counts.max():].any()


@pytest.mark.parametrize("types", ["f16", "int4"])
@pytest.mark.parametrize("new", [1, 2, 70])
def test_compensation_is_exact_for_equal_keys(new, types):
    """Pages go whose keys are all the same: one token stands for them all."""
    cache = cache_of(types, heads="razor", head_dim=48)
    driver, a = Driver(cache, rotary=False), cache.new_sequence()
    q, k, v = driver.random(200)
    k[:, 32:96], gone = k[:, :1], slice(32, 96)
    driver.forward([(a, (q, k, v))], settle=False)
    parts = driver.random(new)
    whole = driver.forward([(a, parts)], settle=False)[0]
    cache.truncate(a, 200)
    assert not a.compensation.any()
    for head in range(2):
        keys, values = dequantise(cache, a, 0, head)
        a.compensation[0, head] = np.r_[64, keys[gone].mean(0), values[gone].mean(0)]
    cache.release(a.tables[..., 1:3].ravel())
    a.tables[..., 1:3] = RELEASED
    driver.compare(driver.forward([(a, parts)], settle=False)[0], whole, types == "int4")
