"""A cache under a budget: memory never exceeds it, the right tokens stay, and what stays is what was written."""
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions, evictions
from edgeattn.cache.pages import CacheFull, PagePool
from edgeattn.page_formats import PAGE
from edgeattn.policies import policy_names
from kv_driver import Driver, dequantise

DEPTH, LAYERS, KV_HEADS = 64, 2, 2
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

    def step(self, count):
        q, k, v = self.driver.random(count)
        where = slice(self.sequence.length, self.sequence.length + count)
        k[:], v[:] = self.codes[0, where, None], self.codes[1, where, None]
        self.driver.forward([(self.sequence, (q, k, v))])

    def check(self):
        """Every kept slot holds the K and V of its position; sinks and the newest tokens are there."""
        cache, a = self.cache, self.sequence
        for layer, head in np.ndindex(cache.shape):
            count = int(a.counts[layer, head])
            positions = np.arange(count) if a.positions is None else a.positions[layer, head, :count]
            k, v = dequantise(cache, a, layer, head)
            assert np.isfinite(k).all() and np.isfinite(v).all()
            for got, codes in ((k @ self.driver.turn.T, self.codes[0]), (v, self.codes[1])):
                np.testing.assert_array_equal((got @ codes[:a.length].T).argmax(1), positions)
            must = np.r_[:min(a.length, cache.options.sink_tokens), max(0, a.length - cache.options.window):a.length]
            assert np.isin(must, positions).all() and len(np.unique(positions)) == count
            assert count <= cache.plan.limits[layer, head] + PAGE - 1


def some_cache(kind, storage, eviction, pages, window, sinks, ubatch, classes=None, tokens=4096):
    """With a budget for about `pages` pages of floats a head."""
    budget = int(pages * LAYERS * KV_HEADS * DEPTH * PAGE * (8 if kind[0] == "f32" else 4))
    options = CacheOptions(*kind, storage=storage, budget=budget, eviction=eviction, window=window, sink_tokens=sinks)
    return KVCache(LAYERS, KV_HEADS, DEPTH, tokens, options, ubatch, classes)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_budget_holds(data):
    """Random options, a prompt longer than the budget holds, then more in chunks and single tokens."""
    draw = data.draw
    cache = None
    while cache is None:
        try:
            classes = draw(st.none() | st.lists(st.booleans(), min_size=4, max_size=4).map(lambda x: np.array(x).reshape(2, 2)))
            cache = some_cache(draw(st.sampled_from(TYPES)), draw(st.sampled_from(policy_names("storage"))), draw(st.sampled_from(evictions())),
                               draw(st.floats(8, 40)), draw(st.sampled_from([32, 64, 96])), draw(st.integers(0, 32)),
                               draw(st.sampled_from([32, 64, 100, 512])), classes)
        except ValueError as error:
            assert "too small" in str(error)
    story = Story(cache, 4096)
    assert cache.total_bytes <= cache.options.budget
    with peak_of(cache, [story.sequence]) as peak:
        prompt = min(int(cache.plan.limits.max() * draw(st.floats(0.5, 2))), 1200)
        steps = [cache.plan.chunk] * (prompt // cache.plan.chunk) + [*filter(None, [prompt % cache.plan.chunk])]
        for count in steps + draw(st.lists(st.just(1) | st.integers(1, cache.plan.chunk), max_size=12)) + [1] * draw(st.sampled_from([0, 70])):
            story.step(count)
        story.check()
    assert peak[0] <= cache.options.budget
