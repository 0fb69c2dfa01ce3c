"""Keys as deltas: bounds on keys and scores, what is left out, exactness where nothing is, and what sequences do with such pages."""
import numpy as np
import pytest

from edgeattn.cache.budget import SelectionPlan, choose_types
from edgeattn.cache.deltas import page_figures
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu import read_pages, seal_pages
from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.page_formats import PAGE, PageFormat
from kv_driver import EXACT, Driver, dequantise, page_bytes

GATES = [1, 8, 16, 0]


def walk(*shape):
    """Keys [..., tokens, head_dim] that drift, fast in some channels; halves."""
    speed = np.geomspace(0.02, 1, shape[-1]).astype(np.float32)
    return (np.cumsum(np.random.default_rng().standard_normal(shape, np.float32) * speed, -2) * 0.3).astype(np.float16).astype(np.float32)


def sealed(k, threshold, gate=16, refresh=0.0):
    """Keys [pages, tokens, head_dim] -> implied ones, the same way round, and the pages."""
    v = np.zeros_like(k)
    about = dict(k_type="delta", v_type="int4")
    pages = seal_pages.seal_pages(k.transpose(0, 2, 1), v, **about, threshold=threshold, gate=gate, refresh=refresh)
    implied, _ = read_pages.read_pages(*pages, head_dim=k.shape[2], **about, gate=gate)
    return implied.transpose(0, 2, 1), pages


def theta_of(pages):
    return pages[0][:, :4].copy().view(np.float32)[:, 0]


def cache_of(threshold=1.0, v_type="f16", *, tokens=1024, kv_heads=2, head_dim=64, ubatch=256, storage="delta", **options):
    k_type = "delta" if storage == "delta" else "f16"
    return KVCache(1, kv_heads, head_dim, tokens, CacheOptions(k_type, v_type, storage, delta_threshold=threshold,
                                                             **{"window": 32, "delta_refresh": 0.0} | options), ubatch)


def fed(driver, tokens):
    """q, k, v of a sequence whose keys walk."""
    q, k, v = driver.random(tokens)
    k[:] = np.moveaxis(walk(*driver.cache.shape, tokens, driver.depth), 2, 1)
    return q, k, v


def feed(driver, sequence, parts, sizes, **options):
    """Forward calls of `sizes` tokens -> outputs, one after the other."""
    found = []
    for size in sizes:
        where = slice(sequence.length, sequence.length + size)
        found.append(driver.forward([(sequence, [x[:, where] for x in parts])], **options)[0])
    return np.concatenate(found, 1)


@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("gate", GATES)
def test_implied_keys_and_scores_stay_within_theta(gate, head_dim):
    k, q = walk(40, PAGE, head_dim), np.random.default_rng().standard_normal(head_dim)
    implied, pages = sealed(k, 1.0, gate)
    theta = theta_of(pages)
    np.testing.assert_allclose(theta, np.sqrt((k ** 2).mean((1, 2))), rtol=2 ** -10)
    assert (np.abs(implied - k).max((1, 2)) <= theta).all() and (implied[:, 0] == k[:, 0]).all()
    assert (np.abs((implied.astype(float) - k) @ q) <= theta[:, None] * np.abs(q).sum() * (1 + 1e-12)).all()
    blocks = (implied[:, 1:] != implied[:, :-1]).reshape(40, PAGE - 1, -1, gate or head_dim).any(3)
    assert 0.15 < 1 - blocks.mean() < 0.98  # something to test


@pytest.mark.parametrize("gate", GATES)
def test_sums_of_deltas_are_scores(gate):
    implied, _ = sealed(walk(10, PAGE, 64), 1.0, gate)
    q, deltas = np.random.default_rng().standard_normal(64), np.diff(implied.astype(float), axis=1, prepend=0)
    np.testing.assert_allclose(np.cumsum(deltas @ q, 1), np.cumsum(deltas, 1) @ q, atol=1e-12)
    np.testing.assert_allclose(np.cumsum(deltas, 1), implied, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
def test_with_theta_0_keys_are_the_given_ones(gate):
    k = np.repeat(walk(20, PAGE // 2, 48), 2, 1)  # every other delta is 0, and left out all the same
    implied, pages = sealed(k, 0.0, gate)
    np.testing.assert_array_equal(implied, k)
    used = (pages[0][:, -(2 * PAGE * 48):] != 0).sum(1).max()
    assert used < 0.6 * 2 * PAGE * 48 and not theta_of(pages).any()


def test_the_key_before_would_drift():
    """Deltas against the previous key, left out where they are small, add up to errors that no Theta bounds."""
    k = walk(30, PAGE, 64) + np.linspace(0, 8, PAGE, dtype=np.float32)[:, None]
    k = k.astype(np.float16).astype(np.float32)
    implied, pages = sealed(k, 0.3, 1)
    theta = theta_of(pages)[:, None, None]
    steps = np.diff(k, axis=1)
    drifting = k[:, :1] + np.cumsum(np.where(np.abs(steps) > theta, steps, 0), 1)
    assert (np.abs(drifting - k[:, 1:]).max((1, 2)) > 2 * theta[:, 0, 0]).all() and (np.abs(implied - k) <= theta).all()


def test_more_is_left_out_with_a_larger_theta():
    k, counts = walk(30, PAGE, 64), []
    for threshold in (0, 0.25, 0.5, 1, 2, 4):
        implied, _ = sealed(k, threshold)
        counts.append((implied[:, 1:] != implied[:, :-1]).reshape(30, PAGE - 1, 4, 16).any(3).sum())
    assert counts == sorted(counts, reverse=True) and counts[0] > 2 * counts[-1]


@pytest.mark.parametrize("v_type", ["f16", "int8", "int4"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("group", [1, 4, 7])
def test_prefill_and_decode_read_the_same_keys(group, gate, v_type):
    """Both against the reference over the implied keys; with values in 16 bits decode rounds nothing."""
    cache = cache_of(0.7, v_type, delta_gate=gate, head_dim=int(np.random.default_rng().choice([16, 48, 64, 128])))
    driver, a = Driver(cache, group, rotary=False), cache.new_sequence()
    parts = fed(driver, 420)
    feed(driver, a, parts, [256, 100, 40], check=True)
    for _ in range(3):
        q, _, _ = new = [x[:, a.length:a.length + 1] for x in parts]
        out, = driver.forward([(a, new)], settle=False)
        for head in range(2) if v_type == "f16" else ():
            own = slice(head * group, (head + 1) * group)
            expected = driver.attention(driver.rotated(q[0], a)[:, own], *dequantise(cache, a, 0, head))
            np.testing.assert_allclose(out[0, :, own], expected, rtol=0, atol=EXACT)
    assert cache.delta_figures(a).skipped.min() > 0.1


def test_theta_0_and_long_windows_are_dense():
    plain, zero, young = cache_of(storage="kivi"), cache_of(0.0), cache_of(2.0, window=512)
    outputs, parts = [], None
    for cache in (plain, zero, young):
        driver, a = Driver(cache, 4), cache.new_sequence()
        parts = parts or fed(driver, 400)
        outputs.append(feed(driver, a, parts, [200, 150, *[1] * 40], check=False))
    steps = [out[:, 350:] for out in outputs]  # chunks are computed in 8 bits where keys are deltas
    np.testing.assert_allclose(steps[1], steps[0], rtol=0, atol=EXACT)
    np.testing.assert_array_equal(steps[2], steps[0])
    for out in outputs[1:]:
        error = np.linalg.norm(out - outputs[0], axis=-1) / np.linalg.norm(outputs[0], axis=-1)
        assert error.mean() < 0.03


def test_chunks_and_tokens_make_the_same_pages():
    cache = cache_of(0.7, "int4", kv_heads=1)
    driver = Driver(cache, rotary=False)
    parts, found = fed(driver, 250), []
    for sizes in ([250], [1] * 250, [77, 100, 73], [32] * 7 + [26]):
        a = cache.new_sequence()
        feed(driver, a, parts, sizes, check=False)
        cache.settle(a, 2)
        found.append(page_bytes(cache, a))
        assert a.sealed.min() == 6
    assert all(pages == found[0] for pages in found)


def test_pages_that_hardly_repeat_stay_whole():
    """Keys that jump are kept in 16 bits, and count as such."""
    cache = cache_of(1.0, delta_refresh=0.3)
    driver, a = Driver(cache, rotary=False), cache.new_sequence()
    q, k, v = fed(driver, 300)
    k[:, :, 1] = np.random.default_rng().standard_normal(k[:, :, 1].shape)
    feed(driver, a, (q, k, v), [150, 150])
    figures, pages = cache.delta_figures(a), int(a.sealed[0, 0]) - 1
    assert (figures.pages == pages).all() and figures.skipped[0, 1] == figures.theta[0, 1] == figures.unread[0, 1] == 0
    assert figures.skipped[0, 0] > 0.3 and figures.theta[0, 0] > 0
    keys, _ = cache.read(a, 0, 1)
    np.testing.assert_array_equal(keys, k[0, :, 1].astype(np.float16))


@pytest.mark.parametrize("gate, head_dim", [(16, 64), (8, 128), (1, 64), (0, 64)])
def test_bytes(gate, head_dim):
    """Held: a page in 16 bits and 32 bits a block more. Read: those, and what was written."""
    size = gate or head_dim
    head = -(-(4 + 4 * head_dim // size) // 64) * 64
    assert PageFormat(head_dim, "delta", "int4", gate=gate).k_bytes == 64 * head_dim + head
    cache = cache_of(1.0, head_dim=head_dim, delta_gate=gate, kv_heads=1)
    driver, a = Driver(cache, rotary=False), cache.new_sequence()
    feed(driver, a, fed(driver, 320), [160, 160])
    figures, keys = cache.delta_figures(a), cache.read(a, 0, 0)[0][PAGE:PAGE * int(a.sealed[0, 0])]
    keys = keys.reshape(-1, PAGE, head_dim // size, size)
    written = (keys[:, 1:] != keys[:, :-1]).any(3).sum()  # a block that is written differs, as Theta is not 0
    possible = keys[:, 1:, :, 0].size
    assert figures.skipped[0, 0] == pytest.approx(1 - written / possible)
    read = 2 * size * (written + len(keys) * head_dim // size) + len(keys) * head
    assert cache.stored_bytes(a) - cache.touched_bytes(a) == figures.unread[0, 0] == len(keys) * (64 * head_dim + head) - read
    pool, numbers = cache.pools[1], a.tables[0, 0, 1:a.sealed[0, 0]] // POOLS
    assert page_figures(pool, numbers)[3].sum() == read


def test_forks_and_cuts():
    cache = cache_of(0.7, "int4")
    driver, a = Driver(cache, rotary=False), cache.new_sequence()
    parts = fed(driver, 400)
    feed(driver, a, parts, [256, 44])
    b = cache.fork(a)
    feed(driver, b, parts, [1] * 70)
    assert (a.tables[..., 1:8] == b.tables[..., 1:8]).all() and a.sealed[0, 0] == 8
    assert cache.truncate(b, 150) == 128
    feed(driver, b, parts, [100, *[1] * 30])
    c = cache.new_sequence()
    feed(driver, c, parts, [256, 1, 1], check=False)
    cache.settle(b, 2)
    assert page_bytes(cache, b) == page_bytes(cache, c)
    for sequence in (a, b, c):
        cache.truncate(sequence, 0)
    assert not any(pool.used for pool in cache.pools)


@pytest.mark.parametrize("eviction", ["key_diff", "streaming_llm"])
def test_whole_pages_are_evicted(eviction):
    cache = cache_of(0.7, "int4", tokens=4096, ubatch=64, budget=260_000, eviction=eviction, sink_tokens=4)
    driver, a = Driver(cache, rotary=False), cache.new_sequence()
    feed(driver, a, fed(driver, 1504), [32] * 47)
    assert (a.counts < 1400).all() and cache.used_bytes <= 260_000 and cache.delta_figures(a).pages.min() > 3
    keys, _ = dequantise(cache, a, 0, 0)
    assert not np.isnan(keys).any() and (a.tables[0, 0, :-(-a.counts[0, 0] // PAGE)] != RELEASED).all()


@pytest.mark.parametrize("given, v_type", [({}, "f16"), (dict(v_type="int4"), "int4"), (dict(budget=100 << 20), "f16"),
                                           (dict(budget=1 << 20), "int4")])
def test_keys_need_no_type(given, v_type):
    options = choose_types(CacheOptions(storage="delta", **given), "f32", 8, 2, 64, 4096, 512)
    assert (options.k_type, options.v_type, options.quantised) == ("delta", v_type, True)


def test_pages_are_selected_like_others():
    """Their bounds are indexed apart, as for pages in 16 bits: they have no parameters that would tell."""
    plan = SelectionPlan(1, 64, "bounds")
    assert plan.width(cache_of().plan.formats) == 2 * 64


@pytest.mark.parametrize("given, word", [(dict(k_type="int4", storage="delta"), "-ctk"), (dict(k_type="delta"), "--kv-storage delta"),
                                         (dict(v_type="delta"), "v_type"), (dict(delta_gate=5), "delta_gate"),
                                         (dict(delta_threshold=-1.0), "delta_threshold"), (dict(delta_refresh=2.0), "delta_refresh")])
def test_wrong_options_are_named(given, word):
    with pytest.raises(ValueError, match=word):
        CacheOptions(**given)
