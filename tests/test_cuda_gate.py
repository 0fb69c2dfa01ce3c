"""What a learnt gate chooses for prompts on a GPU against the policy in NumPy, of keys that are turned back."""
import numpy as np
import pytest
from cuda_device import needs_cuda
from cuda_prompts import LAST, SHAPES, Prompts, pairs_of

from edgeattn.policies import load_policy
from edgeattn.policies.prefill.seer_attention import visible
from edgeattn.prefill_plan import causal
from edgeattn.reference.cached_attention import rotate

pytestmark = needs_cuda
RNG = np.random.default_rng()
WIDTH = 48
ABOUT = {"interleaved": dict(rotary_dim=40, interleaved=1), "halves": dict(rotary_dim=32, interleaved=0)}  # of the model


def tables(positions, pairs, factor):
    angles = np.arange(positions)[:, None] * 1e4 ** (-np.arange(pairs) / pairs)
    return [(factor * x).astype(np.float32) for x in (np.cos(angles), np.sin(angles))]


def gate_of(heads, kv_heads, head_dim, cos, sin, interleaved, own):
    """Of random weights, with rotary tables of its own or the model's; scores of blocks are a few nats apart."""
    weights = {"gate_q": RNG.standard_normal((1, heads, head_dim, WIDTH), np.float32),
               "gate_k": 0.2 * RNG.standard_normal((1, kv_heads, 3 * head_dim, WIDTH), np.float32) / head_dim ** 0.5}
    return {"cos": cos, "sin": sin, "interleaved": interleaved} | weights | (
        dict(zip(("gate_cos", "gate_sin"), tables(len(cos), WIDTH // 2, 1))) if own else {})


def turn(prompts, about):
    """Prompts whose queries and new keys are rotated, by tables that carry a factor."""
    from edgeattn.kernels_cuda import device
    cos, sin = tables(len(prompts.tensors["cos"]), about["rotary_dim"] // 2, 1.2)
    prompts.about |= about
    prompts.tensors |= {"cos": device.cupy().asarray(cos), "sin": device.cupy().asarray(sin)}
    places = [slice(past, past + n) for past, n in zip(prompts.lengths, prompts.new)]
    prompts.q = [rotate(q.swapaxes(0, 1), cos[x], sin[x], about["interleaved"]).swapaxes(0, 1) for q, x in zip(prompts.q, places)]
    return cos, sin


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f32", "f16", "int4"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES)
@pytest.mark.parametrize("name", ["threshold", "fraction"])
def test_blocks_are_those_that_the_gate_expects(name, shape, lengths, new, listed, types, whole):
    """Up to blocks whose weight is near the least that counts."""
    prompts = Prompts(types, *shape, lengths, new, listed, whole)
    about = ABOUT["interleaved" if name == "fraction" else "halves"]
    assets = gate_of(*shape, *turn(prompts, about), bool(about["interleaved"]), own=name == "fraction")
    policy = load_policy("prefill", "seer_attention", {name: {"threshold": 0.1, "fraction": 0.3}[name], "recent": 0})
    found, out, (read, _) = prompts.run(policy, assets=assets)
    total, scale, group = 0, shape[2] ** -0.5, shape[0] // shape[1]
    for s, plan in found.items():
        sandwich = []
        for far in (1.001, 0.999):
            blocks = [limited(policy, prompts.q[s][h * group:(h + 1) * group], k, h, assets, far).any(0)
                      for h, k in enumerate(prompts.keys(s)[0])]
            sandwich.append(policy.plan(np.stack(blocks), None, plan.queries, plan.keys).blocks)
            if whole:
                sandwich[-1][:, -LAST:] = causal(plan.queries, plan.keys)[-LAST:]
        must, may = sandwich
        print(f"{name}: must {must.mean():.3f}, {plan.blocks.mean():.3f}, may {may.mean():.3f}")
        assert not (must & ~plan.blocks).any() and not (plan.blocks & ~may).any()
        assert prompts.close(s, out, plan, scale) < 4e-3
        total += pairs_of(plan)
    assert abs(read - total) < 0.5


def limited(policy, q, k, head, assets, far):
    """Pages [group, query blocks, pages] with a limit `far` times as high as one between what is chosen and what is not."""
    gate, allowed = policy.gate(q, k, 0, head, assets), visible(q.shape[1], len(k))
    limit = np.full((*gate.shape[:2], 1), policy.threshold)
    if policy.fraction:
        ordered = np.pad(-np.sort(-np.where(allowed, gate, 0), 2), ((0, 0), (0, 0), (1, 1)))
        counts = np.ceil(policy.fraction * allowed.sum(1)).astype(int)
        limit = (ordered[:, np.arange(len(counts)), counts] + ordered[:, np.arange(len(counts)), counts + 1])[..., None] / 2
    return np.repeat((gate > far * limit) & allowed, 2, 2)[..., :causal(q.shape[1], len(k)).shape[1]]
