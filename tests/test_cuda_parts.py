"""What kernels choose until a part of a prompt's weights is covered, against the policies in NumPy: by sampled queries' true weights, and
by means of tokens that are alike. Weights near a limit may fall on either side of it."""
from importlib import import_module

import numpy as np
import pytest
from cuda_device import needs_cuda
from cuda_prompts import LAST, SHAPES, Prompts, pairs_of

from edgeattn.kernels_cuda import choose_by_samples
from edgeattn.kernels_cuda.prefill_call import QUERIES
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy
from edgeattn.policies.prefill.flex_prefill import divergence
from edgeattn.policies.prefill.sparge_attn import NAME, self_similarity
from edgeattn.prefill_plan import best, causal, cover, ends, pool, softmax, spread, true_weights

pytestmark = needs_cuda


def loosely(monkeypatch, module, far):
    """Choices of a policy's module with a part a little smaller than asked for, less what nearly equals the least that counts (far < 1), or
    larger, with that: what must be chosen and what may be, where kernels round."""
    def limited(found, weights):
        least = np.where(found, weights, np.inf).min(-1, keepdims=True)
        return (weights > least / far if far < 1 else weights >= least / far) & np.isfinite(least)
    part_of = 0.8 + 0.2 * far
    monkeypatch.setattr(module, "cover", lambda x, allowed, part: limited(cover(x, allowed, np.minimum(1, part * part_of)), x) & allowed)
    monkeypatch.setattr(module, "best", lambda x, allowed, count: limited(best(x, allowed, count), x) & allowed, raising=False)


def gap(found, most=1.0):
    """A limit that is not near any of these numbers, with a part `most` of them below it at most, and one at least."""
    ordered = np.sort(found)[:max(2, int(most * len(found)))]
    below = np.argmax(np.diff(ordered))
    return float(ordered[below:below + 2].mean())


def check(monkeypatch, prompts, policy, scale, assets=None):
    """What is chosen lies between what must be and what may be, is what attention reads, and what counters count."""
    found, out, (read, pairs) = prompts.run(policy, assets=assets)
    total = 0
    for s, plan in found.items():
        sandwich = []
        for far in (0.95, 1.05):
            with monkeypatch.context() as patch:
                loosely(patch, import_module(type(policy).__module__), far)
                sandwich.append(policy.select(prompts.q[s], list(prompts.keys(s)[0]), scale, 0, assets).union(prompts.kv_heads))
            if prompts.whole:
                sandwich[-1].blocks[:, -LAST:] = causal(plan.queries, plan.keys)[-LAST:]
        must, read_keys, may = map(keys_of, (sandwich[0], plan, sandwich[1]))
        print(f"{type(policy).__name__}: must {must.mean():.3f}, {read_keys.mean():.3f}, may {may.mean():.3f}")
        assert not (must & ~read_keys).any() and not (read_keys & ~may).any()
        assert prompts.close(s, out, plan, scale) < 4e-3
        total += pairs_of(plan)
    assert abs(read - total) < 0.5


def keys_of(plan):
    """[KV heads, query blocks, keys] bool: what is read, as pages or alone."""
    pages = spread(plan.blocks, plan.keys) & (np.arange(plan.keys) < ends(plan.queries, plan.keys)[:, None])
    return pages if plan.columns is None else pages | plan.columns


SAMPLES = {"sampled": ("sample_attention", {"columns": 0.6, "slashes": 0.3}),
           "columns alone": ("sample_attention", {"columns": 0.7, "slashes": 0.0, "segment": 96, "rows": 5, "recent": 1}),
           "flex": ("flex_prefill", {"gamma": 0.5, "budget": 64}),
           "proxies": ("proxy_attn", {"gamma": 0.6, "budget": 64, "proxies": 2}),
           "proxies, strides of 16": ("proxy_attn", {"gamma": 0.7, "budget": 0, "proxies": 8, "stride": 16, "sink": 2, "recent": 0}),
           "never by means": ("flex_prefill", {"gamma": 0.6, "tau": 0.0, "budget": 0})}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES[:4])
@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_say_what_is_read(monkeypatch, kind, shape, lengths, new, listed, types, whole):
    prompts = Prompts(types, *shape, lengths, new, listed, whole)
    check(monkeypatch, prompts, policy_of(kind, prompts), shape[2] ** -0.5)


@pytest.mark.parametrize("kind", ["sampled", "flex"])
def test_many_rows_are_weighed_in_pieces(monkeypatch, kind):
    """Of 16 rows; heads begin within them."""
    monkeypatch.setattr(choose_by_samples, "PIECE_BYTES", 1)
    prompts = Prompts("f16", 7, 1, 64, [700, 37, 300], [150, 1, 300], [0, 2], False)
    check(monkeypatch, prompts, policy_of(kind, prompts), 0.125)


def policy_of(kind, prompts):
    name, options = SAMPLES[kind]
    if kind == "flex":
        group, found = prompts.heads // prompts.kv_heads, [np.zeros(1)]
        for s in prompts.listed:
            q = prompts.q[s].reshape(prompts.kv_heads, group, *prompts.q[s].shape[1:])
            found += [apart(*both, prompts.head_dim ** -0.5) for both in zip(q, prompts.keys(s)[0])]
        options = options | {"tau": gap(np.concatenate(found))}
    return load_policy("prefill", name, options)


def apart(q, k, scale):
    """Roots of what flex_prefill compares with tau, of the query heads of a KV head."""
    n, m = q.shape[1], len(k)
    rows = np.arange(max(0, n - QUERIES), n)
    pages = np.add.reduceat(true_weights(q, k, rows, scale).sum(1), np.arange(0, m, PAGE), 1) / len(rows)
    return np.sqrt(divergence(softmax(q[:, rows].mean(1) @ pool(k, PAGE).T * scale), pages))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES)
@pytest.mark.parametrize("fitted", [False, True])
def test_means_count_where_tokens_are_alike(monkeypatch, fitted, shape, lengths, new, listed, types, whole):
    """Of each head its own limit and part, or of all the same."""
    (heads, kv_heads, _), scale = shape, shape[2] ** -0.5
    prompts, group = Prompts(types, *shape, lengths, new, listed, whole), heads // kv_heads
    alike = []
    for h in range(heads):
        keys = [prompts.keys(s)[0][h // group] for s in listed]
        blocks = [self_similarity(prompts.q[s][h], QUERIES) for s in listed]
        alike.append(np.concatenate([*blocks, *(self_similarity(k - k.mean(0), PAGE) for k in keys)]))
    if fitted:
        limits = np.array([[gap(found, 0.15), part] for found, part in zip(alike, 0.3 + 0.6 * np.arange(heads) / heads)], np.float32)
        check(monkeypatch, prompts, load_policy("prefill", "sparge_attn", {"recent": 0}), scale, {NAME: limits[None]})
    else:
        policy = {"mode": "cdf", "cdf": 0.6, "similarity": gap(np.concatenate(alike), 0.1)}
        check(monkeypatch, prompts, load_policy("prefill", "sparge_attn", policy), scale)
