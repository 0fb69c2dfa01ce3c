"""A cache under a budget: memory never exceeds it, the right tokens stay, and what stays is what was written."""
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions, evictions
from edgeattn.cache.pages import CacheFull, PagePool
from edgeattn.kernels_cpu.page_pool import POOLS
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy, policy_names
from kv_driver import Driver, dequantise, page_bytes

DEPTH, KV_HEADS = 64, 2
TYPES = [("f32", "f32"), ("f16", "f16"), ("int8", "int8"), ("int4", "int4"), ("int3", "int3"), ("int2", "int2"), ("int4", "f16"),
         ("f16", "int4")]


@contextmanager
def peak_of(cache, sequences):
    """-> a list whose element is the most bytes that the cache's pages, the sequences' arrays and a chunk took at any moment."""
    peak, allocate = [0], PagePool.allocate

    def watched(pool, count):
        found = allocate(pool, count)
        state = max((sequence.nbytes for sequence in sequences), default=0)
        peak[0] = max(peak[0], sum(p.used_bytes for p in cache.pools) + state + cache.plan.chunk_bytes())
        return found
    with patch.object(PagePool, "allocate", watched):
        yield peak


class Story:
    """One sequence whose tokens say where they stand: K and V of position p are rows p of a table of signs."""

    def __init__(self, cache, tokens):
        self.cache, self.driver, self.sequence = cache, Driver(cache, 2, rotary=False), cache.new_sequence()
        self.codes = np.random.default_rng().choice(np.float32([-1, 1]), (2, tokens, DEPTH))

    def step(self, count, check=True):
        q, k, v = self.driver.random(count)
        where = slice(self.sequence.length, self.sequence.length + count)
        k[:], v[:] = self.codes[0, where, None], self.codes[1, where, None]
        self.driver.forward([(self.sequence, (q, k, v))], check)

    def check(self, settled=True):
        """Every kept slot holds the K and V of its position; sinks and the newest tokens are there."""
        cache, a = self.cache, self.sequence
        must = np.r_[:min(a.length, cache.options.sink_tokens), max(0, a.length - cache.options.window):a.length]
        for layer, head in np.ndindex(cache.shape):
            count = int(a.counts[layer, head])
            positions = np.arange(count) if a.positions is None else a.positions[layer, head, :count]
            k, v = dequantise(cache, a, layer, head)
            for got, codes in ((k @ self.driver.turn.T, self.codes[0]), (v, self.codes[1])):
                np.testing.assert_array_equal((got @ codes[:a.length].T).argmax(1), positions)
            assert np.isin(must, positions).all() and len(np.unique(positions)) == count
            assert count <= cache.plan.limits[layer, head] + PAGE - 1 or not settled  # a page of decoded tokens at a time


def some_cache(kind, storage, eviction, pages, window=32, sinks=4, ubatch=64, classes=None, *, heads="none", layers=1, tokens=4096):
    """With a budget of about `pages` pages of floats a head."""
    budget = int(pages * layers * KV_HEADS * DEPTH * PAGE * (8 if kind[0] == "f32" else 4))
    options = CacheOptions(load_policy("storage", storage).keys or kind[0], kind[1], storage=storage, budget=budget, eviction=eviction,
                           window=window, sink_tokens=sinks, heads=heads)
    return KVCache(layers, KV_HEADS, DEPTH, tokens, options, ubatch, classes)


def draw_cache(draw):
    while True:
        try:
            classes = draw(st.none() | st.lists(st.booleans(), min_size=2, max_size=2).map(lambda x: np.array([x])))
            kind = draw(st.sampled_from(TYPES))
            storage = draw(st.sampled_from(policy_names("storage"))) if kind in TYPES[2:] else "kivi"
            return some_cache(kind, storage, draw(st.sampled_from(evictions())),
                              draw(st.floats(8, 24)), draw(st.sampled_from([32, 64, 96])), draw(st.integers(0, 32)),
                              draw(st.sampled_from([32, 64, 100, 512])), classes, heads=draw(st.sampled_from(["none", "razor"])))
        except ValueError as error:
            assert "too small" in str(error)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_budget_holds(data):
    """Random options, a prompt longer than the budget holds, then chunks and single tokens, and forks that go their own way."""
    draw = data.draw
    cache = draw_cache(draw)
    assert cache.total_bytes <= cache.options.budget
    story, other = Story(cache, 4096), None
    with peak_of(cache, [story.sequence]) as peak:
        prompt = min(int(cache.plan.limits.max() * draw(st.floats(0.5, 2))), 800)
        for count in [cache.plan.chunk] * (prompt // cache.plan.chunk) + [*filter(None, [prompt % cache.plan.chunk])]:
            story.step(count, check=False)
        story.check()
        for count in draw(st.lists(st.just(1) | st.integers(1, cache.plan.chunk), max_size=8)) + [1] * draw(st.sampled_from([0, 70])):
            story.step(count, check=count > 1)
        story.check()
        if draw(st.booleans()):
            other = Story(cache, 4096)
            other.codes, other.sequence = story.codes, cache.fork(story.sequence)
            full = False
            for each, count in draw(st.lists(st.tuples(st.sampled_from([story, other]), st.integers(1, cache.plan.chunk)), max_size=8)):
                try:
                    each.step(count, check=False)
                except CacheFull:  # a budget is for one sequence
                    full = True
                    break
            story.check(not full)
            other.check(not full)
    assert peak[0] <= cache.options.budget
    entries = np.concatenate([x.sequence.tables.ravel() for x in (story, other) if x])
    for i, pool in enumerate(cache.pools):
        held = np.bincount(entries[(entries >= 0) & (entries % POOLS == i)] // POOLS, minlength=len(pool.references))
        np.testing.assert_array_equal(held, pool.references)


@pytest.mark.parametrize("eviction", ["zip_saliency", "snapkv"])
def test_salient_pages_may_be_all_that_is_left(eviction):
    """Some tokens stay important: eviction takes ZipCache's narrow pages first, and the wide pages run out."""
    cache = some_cache(("int4", "int4"), "zipcache", eviction, 16)
    story, settle, worth = Story(cache, 4096), cache.settle, np.random.default_rng().random(4096, np.float32)

    def settle_worth(sequence, count):
        sequence.mass[0], sequence.mass[1] = worth[sequence.positions], 1
        settle(sequence, count)
    cache.settle = settle_worth
    for _ in range(30):
        story.step(cache.plan.chunk, check=False)
        for _ in range(int(np.random.default_rng().integers(0, 50))):
            story.step(1, check=False)
    story.check()


@pytest.mark.parametrize("eviction", evictions())
def test_evicting_is_masking(eviction):
    """Attention over what is left is attention over everything with the others hidden, at their own positions."""
    cache = some_cache(("f32", "f32"), "kivi", eviction, 10, layers=2)
    driver, a, history = Driver(cache), cache.new_sequence(), np.zeros((2, 2, 4096, KV_HEADS, DEPTH), np.float32)
    steps = [cache.plan.chunk] * 12 + [1] * 40 + [7, 20]
    for step, count in enumerate(steps):
        parts = driver.random(count)
        out = driver.forward([(a, parts)], check=False, settle=False)[0]
        new = slice(a.length - count, a.length)
        for layer in range(2):
            history[0, layer, new], history[1, layer, new] = driver.rotated(parts[1][layer], a), parts[2][layer]
        if step % 10 == 0 or step > 45:
            for layer, head in np.ndindex(cache.shape):
                keys, values = history[:, layer, :a.length, head]
                kept = np.isin(np.arange(a.length), a.positions[layer, head, :a.counts[layer, head]])
                q = driver.rotated(parts[0][layer], a)[:, 2 * head:2 * head + 2]
                expected = driver.weights(q, np.where(kept[:, None], keys, np.nan)) @ values
                np.testing.assert_allclose(out[layer, :, 2 * head:2 * head + 2], expected, rtol=0, atol=driver.tolerance)
        cache.settle(a, count)
    assert (a.counts < a.length - PAGE).all()


@pytest.mark.parametrize("storage, kind", [("kivi", ("f16", "f16")), *((name, kind) for name in policy_names("storage")
                                                                       for kind in (("int4", "int4"), ("int4", "f16")))])
def test_a_large_budget_changes_nothing(kind, storage):
    # Policies that weigh tokens probe more often, which is seen by storage that weighs them, too.
    eviction = np.random.default_rng().choice(["random", "key_diff"] if storage in ("zipcache", "akvq") else evictions())
    print(eviction)  # pytest shows it when the test fails
    options = CacheOptions(load_policy("storage", storage).keys or kind[0], kind[1], storage=storage, window=32)
    tight, free = some_cache(kind, storage, str(eviction), 100, tokens=500), KVCache(1, KV_HEADS, DEPTH, 500, options, 64)
    assert (tight.plan.limits >= 500).all()
    pairs = [(Driver(cache), cache.new_sequence()) for cache in (free, tight)]
    for count in [64, 64, 30] + [1] * 40 + [64, 64, 50, 1, 64]:
        parts = pairs[0][0].random(count)
        one, other = (driver.forward([(a, parts)], check=False)[0] for driver, a in pairs)
        np.testing.assert_array_equal(one, other)
    one, other = (page_bytes(driver.cache, a) for driver, a in pairs)
    assert one == other and (pairs[0][1].sealed == pairs[1][1].sealed).all()


@pytest.mark.parametrize("head", range(2))
def test_what_streaming_heads_drop_is_compensated(head):
    """The compensation token holds the number, mean key and mean value of what is gone, and attention counts it in."""
    classes = np.array([[head == 1, head == 0]])
    cache = KVCache(1, KV_HEADS, DEPTH, 1024, CacheOptions("f32", "f32", heads="razor", window=32), 64, classes)
    driver, a = Driver(cache), cache.new_sequence()
    k, v = driver.fill(a, 640)
    count = a.counts[0, head]
    gone = np.setdiff1d(np.arange(640), a.positions[0, head, :count])
    keys = driver.rotated(k[0], a)[gone, head]
    np.testing.assert_allclose(a.compensation[0, head], np.r_[len(gone), keys.mean(0), v[0, gone, head].mean(0)], rtol=0, atol=1e-5)
    assert a.counts[0, 1 - head] == 640 and not a.compensation[0, 1 - head].any() and len(gone) > PAGE
    driver.forward([(a, driver.random(1))])
    driver.forward([(a, driver.random(30))])
