"""Layers share a budget by how widely their attention is spread; the sum stays."""
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from edgeattn.cache import session
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.layer_budget import MOST, RULES, ZipVL, share
from edgeattn.cache.options import CacheOptions
from edgeattn.page_formats import PAGE
from kv_driver import Driver
from test_kv_budget import peak_of

DEPTH, KV_HEADS, LAYERS, WINDOW = 32, 2, 4, 32
KINDS = {"f32": ("f32", "f32", "kivi"), "int4": ("int4", "int4", "kivi"), "zipcache": ("int8", "int8", "zipcache")}
SPREAD = (8.0, 0.0, 2.0, 1.0)  # sizes of the layers' queries: 0 is uniform attention, 8 sees few tokens


def make(kind="f32", eviction="h2o", budget="zipvl", pages=12, classes=None):
    k, v, storage = KINDS[kind]
    size = int(pages * LAYERS * KV_HEADS * DEPTH * PAGE * 2 * {"f32": 4, "int4": 2, "zipcache": 4.5}[kind])
    options = CacheOptions(k, v, storage, size, eviction, window=WINDOW, layer_budget=budget)
    return KVCache(LAYERS, KV_HEADS, DEPTH, 4096, options, 64, classes)


def fill(driver, sequence, tokens, spread=SPREAD, chunk=64):
    chunk = min(chunk, driver.cache.plan.chunk)
    for start in range(0, tokens, chunk):
        q, k, v = driver.random(min(chunk, tokens - start))
        q[:] = np.random.default_rng(7).standard_normal(DEPTH) * np.float32(spread)[:, None, None, None]  # all ask for the same
        driver.forward([(sequence, (q, k, v))], check=False)


# ---- what a layer needs ----------------------------------------------------------------------------------------------
@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=60), st.floats(0.01, 1), st.floats(0.01, 1))
def test_more_attention_needs_more_tokens(mass, one, other):
    mass, (low, high) = np.float32(mass), sorted((one, other))
    few, more = ZipVL(low).tokens(mass), ZipVL(high).tokens(mass)
    assert 1 <= few <= more <= len(mass) == ZipVL(1).tokens(mass)
    kept = np.sort(mass.astype(np.float64))[::-1]
    assert kept[:few].sum() >= low * kept.sum() * (1 - 1e-9)
    assert few == 1 or kept[:few - 1].sum() < low * kept.sum() * (1 + 1e-9)


def test_needs_of_known_attention():
    assert ZipVL(0.75).tokens(np.ones(64)) == 48 and ZipVL(0.975).tokens(np.eye(1, 64)[0]) == 1
    for tau in (0, 1.1, -1):
        with pytest.raises(ValueError, match="tau"):
            ZipVL(tau)


# ---- shares ----------------------------------------------------------------------------------------------------------
@given(weights=st.lists(st.integers(1, 4000), min_size=1, max_size=40), even=st.integers(0, 100), floor=st.integers(1, 10), data=st.data())
def test_shares(weights, even, floor, data):
    weights, most = np.array(weights), even + data.draw(st.integers(0, even + floor))
    equal = np.full(len(weights), 8)
    steps = share(weights, equal, even, floor, most)
    assert steps.sum() == even * len(weights) and steps.min() >= 0 and steps.max() <= most
    order = np.argsort(weights, kind="stable")
    assert (np.diff(steps[order]) >= -1).all()  # rounding alone may favour the one with less
    ideal = (floor + even) * weights / weights.mean() - floor
    if (ideal >= 0).all() and (ideal <= most).all():
        assert np.abs(steps - ideal).max() <= 1 + 1e-6
    np.testing.assert_array_equal(share(np.full_like(weights, 7), equal, even, floor, most), even)
    heads = np.array(data.draw(st.lists(st.integers(0, 8), min_size=len(weights), max_size=len(weights))))
    steps = share(weights, heads, even, floor, most)
    assert steps @ heads <= even * heads.sum() and steps.min() >= 0 and steps.max() <= most


# ---- the cache -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, eviction", [("f32", "h2o"), ("f32", "streaming_llm"), ("int4", "snapkv"), ("zipcache", "h2o")])
def test_layers_share_and_the_budget_holds(kind, eviction):
    cache = make(kind, eviction)
    plan, sequence = cache.plan, cache.new_sequence()
    driver, even = Driver(cache, rotary=False), int(cache.plan.limits[0, 0])
    assert cache.total_bytes <= cache.options.budget and plan.state_bytes() >= sequence.nbytes
    with peak_of(cache, [sequence]) as peak:
        fill(driver, sequence, even // 64 * 64)
        assert not sequence.limits.any() and cache.limits(sequence) is plan.limits
        fill(driver, sequence, 128)
        limits = sequence.limits.copy()
        assert (limits == limits[:, :1]).all() and limits.sum() == plan.limits.sum()
        assert limits.min() >= 2 * PAGE + WINDOW and limits.max() <= plan.most <= MOST * even
        assert limits[0, 0] < even < limits[1, 0] and limits[0, 0] < limits[2, 0] <= limits[3, 0] <= limits[1, 0]
        fill(driver, sequence, 256)
        fill(driver, sequence, 40, chunk=1)
        q, k, v = driver.random(20)
        driver.forward([(sequence, (q, k, v))])  # what is read is what is held
    assert peak[0] <= cache.options.budget
    np.testing.assert_array_equal(sequence.limits, limits)  # shared once
    assert (sequence.counts <= limits + PAGE - 1).all() and (sequence.counts > limits - 4 * PAGE).all()
    cache.truncate(sequence, 0)
    assert not sequence.limits.any() and not any(pool.used for pool in cache.pools)


def test_equal_layers_get_equal_shares():
    cache = make()
    sequence = cache.new_sequence()
    fill(Driver(cache, rotary=False), sequence, int(cache.plan.limits[0, 0]) + 64, spread=(0, 0, 0, 0))
    np.testing.assert_array_equal(sequence.limits, cache.plan.limits)
    assert not make(budget="uniform").new_sequence().arrays.keys() & {"limits"}


def test_streaming_heads_keep_their_limits():
    classes = np.array([[True, False], [True, True], [False, False], [True, True]])
    cache = make(classes=classes)
    sequence = cache.new_sequence()
    fill(Driver(cache, rotary=False), sequence, int(cache.plan.limits.max()) + 64)
    np.testing.assert_array_equal(sequence.limits[~classes], cache.plan.limits[~classes])
    assert sequence.limits[classes].sum() <= cache.plan.limits[classes].sum() and sequence.limits[1, 0] > sequence.limits[0, 0]
    fill(Driver(cache, rotary=False), sequence, 512)


def test_each_sequence_shares_for_itself(tmp_path):
    cache = make()
    a = cache.new_sequence()
    fill(Driver(cache, rotary=False), a, int(cache.plan.limits[0, 0]) + 64)
    b = cache.fork(a)
    np.testing.assert_array_equal(a.limits, b.limits)
    b.limits[:] = 7
    assert a.limits[0, 0] != 7
    session.save(tmp_path / "kept", cache, a, [0] * a.length, {}, {})
    cache.truncate(b, 0)
    other = make()
    restored, _, _ = session.load(tmp_path / "kept", other, {})
    np.testing.assert_array_equal(restored.limits, a.limits)


@settings(max_examples=4, deadline=None)
@given(spread=st.lists(st.sampled_from([0.0, 0.5, 2.0, 8.0]), min_size=LAYERS, max_size=LAYERS), kind=st.sampled_from(list(KINDS)),
       pages=st.integers(8, 12), counts=st.lists(st.integers(1, 64), max_size=5))
def test_budget_is_never_exceeded(spread, kind, pages, counts):
    try:
        cache = make(kind, pages=pages)
    except ValueError as error:
        assert "too small" in str(error)
        return
    sequence, driver = cache.new_sequence(), Driver(cache, rotary=False)
    with peak_of(cache, [sequence]) as peak:
        fill(driver, sequence, int(cache.plan.limits[0, 0]) + 64, spread)
        for count in counts:
            fill(driver, sequence, count, spread[::-1])
    assert peak[0] <= cache.options.budget and sequence.limits.sum() == cache.plan.limits.sum()


def test_cascade_lets_deeper_layers_keep_less():
    weights = RULES["cascade"].weights(None, np.ones((8, 2), bool))
    steps = share(weights, np.full(8, 2), 40, 4, 80)
    assert steps.sum() == 8 * 40 and (np.diff(steps) < 0).all() and steps[0] > 1.3 * 40 > 40 > steps[-1] > 0
