"""What every policy that chooses what a prompt reads must keep to."""
import numpy as np
import pytest

from edgeattn.policies import load_policy, policy_names
from edgeattn.prefill_plan import PAGE, QUERIES, attend, causal, forced, recall
from prefill_driver import structured

RNG = np.random.default_rng()
# For each method: options with which it reads everything, and a tight and a loose setting; the second reads all that the first does.
CASES = {
    "anchor": ({"theta": float("inf")}, {"theta": 1.0, "step": 2}, {"theta": 3.0, "step": 2}),
    "auto": ({"part": 1.0, "fraction": 1.0}, {"part": 0.3, "least": 64, "fraction": 0.3, "budget": 0, "recent": 2},
             {"part": 0.8, "least": 64, "fraction": 0.5, "budget": 0, "recent": 2}),
    "dhsa": ({"density": 1.0}, {"density": 0.1}, {"density": 0.3}),
    "dhsa_chunks": ({"budget": 10 ** 6}, {"budget": 300}, {"budget": 800}),
    "flex_prefill": ({"gamma": 1.0}, {"gamma": 0.3, "budget": 32}, {"gamma": 0.7, "budget": 64}),
    "hip": ({"keep": 10 ** 6, "beam": 10 ** 6}, {"keep": 3, "beam": 12, "recent": 2}, {"keep": 10, "beam": 12, "recent": 2}),
    "minference": ({"n_v": 10 ** 6}, {"n_v": 40, "n_s": 120}, {"n_v": 200, "n_s": 200}),
    "moa": ({"beta": 1.0}, {"beta": 0.1}, {"beta": 0.4}),
    "oracle": ({"fraction": 1.0}, {"fraction": 0.1}, {"fraction": 0.3}),
    "pbs_attn": ({"tau": 1.0}, {"tau": 0.3, "segment": 64}, {"tau": 0.7, "segment": 64}),
    "proxy_attn": ({"gamma": 1.0}, {"gamma": 0.4, "budget": 64}, {"gamma": 0.8, "budget": 64}),
    "random": ({"fraction": 1.0}, {"fraction": 0.1}, {"fraction": 0.3}),
    "sale": ({"threshold": 0.0}, {"threshold": 10.0}, {"threshold": 1.0}),
    "sample_attention": ({"columns": 1.0}, {"columns": 0.4, "slashes": 0.3}, {"columns": 0.9, "slashes": 0.8}),
    "seer_attention": ({"threshold": 0.0}, {"fraction": 0.1}, {"fraction": 0.3}),
    "sparge_attn": ({"similarity": 1.0}, {"fraction": 0.1}, {"fraction": 0.3}),
    "streaming": ({"recent": 10 ** 6}, {"sink": 1, "recent": 2}, {"sink": 2, "recent": 8}),
    "xattention": ({"tau": 1.0}, {"tau": 0.3}, {"tau": 0.6}),
}
STATIC = {"moa", "streaming"}  # look at neither queries nor keys: what is asked for here stands anywhere, so that chance does as well
SHAPES = [(100, 100), (64, 64), (33, 500), (512, 512), (200, 1003), (1, 70), (130, 161)]  # (queries, keys)
HEADS = [(4, 1, 64), (8, 2, 64), (7, 1, 128), (8, 1, 32), (2, 2, 256)]  # (heads, KV heads, head_dim)


def made(n, m, heads=4, kv_heads=1, depth=64, rng=RNG):
    q, k, v = structured(rng, heads, kv_heads, m, depth)
    return q[:, m - n:], k, v


def select(method, options, q, k, layer=0):
    policy = load_policy("prefill", method, options)
    return policy.select(q, k, q.shape[2] ** -0.5, layer, assets_of(method, q, k))


def assets_of(method, q, k):
    """What methods that need a calibration are given here."""
    maker = getattr(load_policy("prefill", method), "example_assets", None)
    return maker(len(q), len(k), q.shape[2]) if maker else None


def test_every_method_is_here():
    assert set(CASES) == set(policy_names("prefill"))


@pytest.mark.parametrize("n, m", SHAPES)
@pytest.mark.parametrize("method", CASES)
def test_the_loosest_setting_reads_everything(method, n, m):
    q, k, v = made(n, m)
    plan = select(method, CASES[method][0], q, k)
    assert plan.density() == 1
    assert (plan.blocks == causal(n, m)).all() or plan.columns is not None
    whole = np.tril(np.ones((m, m), bool))[m - n:]
    np.testing.assert_array_equal(plan.mask(), np.broadcast_to(whole, (4, n, m)))


@pytest.mark.parametrize("heads, kv_heads, depth", HEADS)
@pytest.mark.parametrize("method", CASES)
def test_plans_of_all_shapes_are_causal_and_hold_what_is_forced(method, heads, kv_heads, depth):
    for n, m in ((300, 1000), (129, 129), (5, 400)):
        q, k, _ = made(n, m, heads, kv_heads, depth)
        policy, plan = load_policy("prefill", method, CASES[method][1]), select(method, CASES[method][1], q, k)
        assert plan.blocks.shape == (heads, -(-n // QUERIES), -(-m // PAGE)) and plan.blocks.dtype == bool
        assert not (plan.blocks & ~causal(n, m)).any() and plan.mask().any(2).all()
        assert (plan.blocks >= forced(n, m, policy.sink, policy.recent)).all()
        if plan.columns is not None:
            assert plan.columns.shape == (heads, -(-n // QUERIES), m)
            assert not (plan.columns & np.repeat(plan.blocks, PAGE, 2)[..., :m]).any()
        joined = plan.union(kv_heads)
        assert joined.density() >= plan.density() - 1e-9
        assert (np.repeat(joined.mask(), heads // kv_heads, 0) >= plan.mask()).all()


@pytest.mark.parametrize("method", CASES)
def test_a_looser_setting_reads_all_that_a_tighter_one_does(method):
    q, k, _ = made(512, 1536)
    tight, loose = (select(method, options, q, k) for options in CASES[method][1:])
    assert (loose.mask() >= tight.mask()).all() and loose.density() > tight.density()


@pytest.mark.parametrize("method", CASES)
def test_more_weight_is_found_than_by_chance(method):
    q, k, _ = made(512, 2048)
    plan, policy = select(method, CASES[method][1], q, k), load_policy("prefill", method, CASES[method][1])
    if policy.reference or method in STATIC:
        return
    found, scale = recall(q, k, plan, 64 ** -0.5), 64 ** -0.5
    chance = select("random", {"fraction": max(plan.density() - 0.02, 0.01), "sink": policy.sink, "recent": policy.recent}, q, k)
    assert found.mean() > recall(q, k, chance, scale).mean() * min(1, plan.density() / chance.density())
    assert (found <= 1 + 1e-9).all()


@pytest.mark.parametrize("method", CASES)
def test_rows_of_zeros_and_of_great_numbers_choose_something_finite(method):
    q, k, v = made(200, 700)
    q[:, 64:140], k[:, 100:300] = 0, 0
    q[:, 150], k[:, 350] = 1e4, 1e4
    out, _ = attend(q, k, v, select(method, CASES[method][1], q, k), 0.125)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("method", CASES)
def test_the_same_text_gives_the_same_plan(method):
    q, k, _ = made(256, 800)
    first, second = (select(method, CASES[method][1], q.copy(), k.copy()) for _ in range(2))
    np.testing.assert_array_equal(first.mask(), second.mask())
