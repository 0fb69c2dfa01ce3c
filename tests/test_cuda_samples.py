"""Prompts that read what true weights of sampled queries ask for, on a GPU or an emulated one, against the policies in NumPy."""
from importlib import import_module

import numpy as np
import pytest
from cuda_device import needs_cuda
from cuda_prompts import LAST, SHAPES, Prompts, pairs_of

from edgeattn.kernels_cuda.prefill_call import QUERIES
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy
from edgeattn.policies.prefill.flex_prefill import divergence
from edgeattn.prefill_plan import best, causal, cover, pool, softmax, true_weights

pytestmark = needs_cuda


def loosely(monkeypatch, module, far):
    """Choices of a policy's module with a part a little smaller than asked for, less what nearly equals the least that counts (far < 1), or
    larger, with that: what must be chosen and what may be, where kernels round."""
    def limited(found, weights):
        least = np.where(found, weights, np.inf).min(-1, keepdims=True)
        return (weights > least / far if far < 1 else weights >= least / far) & np.isfinite(least)
    part_of = 0.8 + 0.2 * far
    monkeypatch.setattr(module, "cover", lambda x, allowed, part: limited(cover(x, allowed, min(1, part * part_of)), x) & allowed)
    monkeypatch.setattr(module, "best", lambda x, allowed, count: limited(best(x, allowed, count), x) & allowed, raising=False)


def gap(divergences):
    """A limit that is not near any of them, with some below and some above where that can be."""
    ordered = np.sort(np.append(divergences, 0))
    below = np.argmax(np.diff(ordered))
    return float(ordered[below:below + 2].mean())


SAMPLES = {"sampled": ("sample_attention", {"columns": 0.6, "slashes": 0.3}),
           "columns alone": ("sample_attention", {"columns": 0.7, "slashes": 0.0, "segment": 96, "rows": 5, "recent": 1}),
           "flex": ("flex_prefill", {"gamma": 0.5, "budget": 64}),
           "never by means": ("flex_prefill", {"gamma": 0.6, "tau": 0.0, "budget": 0})}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES[:4])
@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_say_what_is_read(monkeypatch, kind, shape, lengths, new, listed, types, whole):
    (name, options), (heads, kv_heads, _), scale = SAMPLES[kind], shape, shape[2] ** -0.5
    prompts, group = Prompts(types, *shape, lengths, new, listed, whole), heads // kv_heads
    if kind == "flex":
        options = options | {"tau": gap(np.concatenate([apart(prompts.q[s][h * group:(h + 1) * group], prompts.keys(s)[0][h], scale)
                                                        for s in listed for h in range(kv_heads)]))}
    policy = load_policy("prefill", name, options)
    found, out, (read, pairs) = prompts.run(policy)
    total = 0
    for s in listed:
        n, m, plan = new[s], lengths[s] + new[s], found[s]
        sandwich = []
        for far in (0.95, 1.05):
            with monkeypatch.context() as patch:
                loosely(patch, import_module(type(policy).__module__), far)
                sandwich.append(policy.select(prompts.q[s], list(prompts.keys(s)[0]), scale).union(kv_heads).blocks)
            if whole:
                sandwich[-1][:, -LAST:] = causal(n, m)[-LAST:]
        must, may = sandwich
        print(f"{kind}: must {must.mean():.3f}, {plan.blocks.mean():.3f}, may {may.mean():.3f}")
        assert not (must & ~plan.blocks).any() and not (plan.blocks & ~may).any()
        total += pairs_of(plan)
        assert prompts.close(s, out, plan, scale) < 4e-3
    assert abs(read - total) < 0.5


def apart(q, k, scale):
    """Roots of what flex_prefill compares with tau, of the query heads of a KV head."""
    n, m = q.shape[1], len(k)
    rows = np.arange(max(0, n - QUERIES), n)
    pages = np.add.reduceat(true_weights(q, k, rows, scale).sum(1), np.arange(0, m, PAGE), 1) / len(rows)
    return np.sqrt(divergence(softmax(q[:, rows].mean(1) @ pool(k, PAGE).T * scale), pages))
