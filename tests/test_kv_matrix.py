"""Every way to store with every way to evict and every head class: a prompt, decoding and a second turn on a small cache."""
import numpy as np
import pytest

from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.matrix import FLOATS, matrix
from edgeattn.cache.options import RELEASING, CacheOptions
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy
from kv_driver import Driver, dequantise

TYPES = ["int8", "int4", "int3", "int2", "int4/f16", "f16/int4"]


CELLS = [pytest.param(c, id=f"{c.storage}-{c.eviction}-{c.heads}") for c in matrix() if not c.refused and c.eviction != RELEASING]


@pytest.mark.parametrize("cell", CELLS)  # RELEASING has tests of its own, test_rebuild.py
def test_triple(cell):
    rng = np.random.default_rng()
    storage, eviction = "kivi" if cell.storage == FLOATS else cell.storage, cell.eviction
    types = str(rng.choice(["f16", "f32"] if cell.storage == FLOATS else TYPES))
    classes = None if cell.heads == "none" else rng.permutation([True, True, False, False]).reshape(2, 2)
    group, head_dim = int(rng.integers(1, 5)), int(rng.choice([16, 48, 64]))
    window, sinks = int(rng.choice([32, 64])), int(rng.integers(0, 33))
    print(f"types {types}, group {group}, head_dim {head_dim}, window {window}, sinks {sinks}")  # pytest shows it when the test fails
    k_type, v_type = (types.split("/") * 2)[:2]
    k_type = load_policy("storage", storage).keys or k_type
    budget = None if eviction == "none" else (28 + 20 * (types == "f32")) * 4 * PAGE * 4 * head_dim
    cache = KVCache(2, 2, head_dim, 1200, CacheOptions(k_type, v_type, storage, budget, eviction, sinks, window, cell.heads,
                                                          delta_threshold=3.0), 100, classes)
    driver, a = Driver(cache, group), cache.new_sequence()
    random = np.random.default_rng().standard_normal((2, *cache.shape, 1200, head_dim), np.float32)  # K and V by position

    def step(count, check):
        q, k, v = driver.random(count)
        new = slice(a.length, a.length + count)
        k[:], v[:] = (np.moveaxis(x[:, :, new], 2, 1) for x in random)
        out, = driver.forward([(a, (q, k, v))], check)
        assert np.isfinite(out).all()
        assert (a.counts <= cache.plan.limits + (PAGE - 1 if count == 1 else 0)).all() and (a.counts <= a.length).all()

    prompt = 320 if eviction == "none" else int(cache.plan.limits.max()) + 150
    for start in range(0, min(prompt, 900), cache.plan.chunk):
        step(min(cache.plan.chunk, prompt - start), start % 300 < cache.plan.chunk)
    for i in range(66):
        step(1, i % 20 == 0)
    step(cache.plan.chunk, True)
    if eviction == "none" and classes is None:
        assert (a.counts == a.length).all()
    for layer, head in np.ndindex(cache.shape):
        count = a.counts[layer, head]
        positions = np.arange(count) if a.positions is None else a.positions[layer, head, :count]
        must = np.r_[:sinks, a.length - window:a.length]
        assert np.isin(must, positions).all() and len(np.unique(positions)) == count
        _, values = dequantise(cache, a, layer, head)
        written = random[1, layer, head, positions]
        assert (values * written).sum() > 0.8 * (written ** 2).sum()  # at their own places, but for rounding to 2 bits
