"""Queries, keys and values with structure, for tests of what a prompt reads."""
import numpy as np


def structured(rng, heads, kv_heads, tokens, depth):
    """q [heads, tokens, depth], k, v [kv_heads, ...] float32. Keys have a mean, the first is a sink, neighbours are alike, and some
    stretches of keys are asked for by some later stretches of queries."""
    group, smooth = heads // kv_heads, np.ones(8) / 8
    k = rng.standard_normal((kv_heads, tokens, depth), np.float32)
    q = 0.7 * rng.standard_normal((heads, tokens, depth), np.float32)
    drift = np.apply_along_axis(lambda x: np.convolve(x, smooth, "same"), 1, rng.standard_normal((kv_heads, tokens, depth)))
    drift = drift.astype(np.float32)
    k += 2 * drift
    q += 2 * np.repeat(drift, group, 0)
    for head in range(heads):
        for start in range(64, tokens - 16, 80):
            place = int(rng.integers(0, start))
            topic = 1.5 * rng.standard_normal(depth).astype(np.float32)
            k[head // group, place:place + 12] += topic
            q[head, start:start + 40] += topic
    k += rng.standard_normal(depth).astype(np.float32)
    k[:, 0] = q.mean((0, 1)) * 6
    return q.astype(np.float32), k.astype(np.float32), rng.standard_normal((kv_heads, tokens, depth), np.float32)
