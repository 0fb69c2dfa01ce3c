"""Spans by head, the learned gate, and what corrections put back of attention that a plan left out."""
import itertools

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from prefill_driver import structured
from safetensors.numpy import save_file

from edgeattn import calibration
from edgeattn.policies import load_policy
from edgeattn.policies.prefill.moa import NAME, Moa, assign, losses
from edgeattn.policies.prefill.seer_attention import FILE, SeerAttention, unrotate
from edgeattn.prefill_corrections import attend_rows, delta, tail
from edgeattn.prefill_plan import PAGE, QUERIES, PrefillPlan, attend, causal, forced, spread
from edgeattn.reference.cached_attention import rotate

RNG = np.random.default_rng()
SHAPES = [(512, 512), (200, 1003), (33, 500), (1, 70), (64, 64), (130, 161)]  # (queries, keys)
SCALE = 0.125
CONFIG = {"model": {"num_layers": 2, "num_heads": 4, "kv_heads": 2, "head_dim": 64}}


def case(n, m, part=0.3, columns=0.0, heads=4, kv_heads=2, depth=64):
    """q, k, v and a plan of random pages (and single keys)."""
    q, k, v = structured(RNG, heads, kv_heads, m, depth)
    blocks = (RNG.random((heads, *causal(n, m).shape)) < part) & causal(n, m) | forced(n, m)
    alone = (RNG.random((*blocks.shape[:2], m)) < columns) & ~spread(blocks, m) if columns else None
    return q[:, m - n:], k, v, PrefillPlan(blocks, alone, n, m)


def everything(n, m, heads=4):
    return PrefillPlan(np.broadcast_to(causal(n, m), (heads, *causal(n, m).shape)), None, n, m)


# ---- Delta Attention -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, m", SHAPES)
def test_delta_of_every_query_and_of_all_last_ones_is_dense(n, m):
    q, k, v, plan = case(n, m)
    dense = attend(q, k, v, everything(n, m), SCALE)
    for options in ({"stride": 1}, {"last": n}, {"last": n + 5, "stride": 64}):
        for got, wanted in zip(delta(*attend(q, k, v, plan, SCALE), q, k, v, SCALE, **options), dense):
            np.testing.assert_allclose(got, wanted, atol=1e-10)
    for got, wanted in zip(delta(*dense, q, k, v, SCALE), dense):
        np.testing.assert_allclose(got, wanted, atol=1e-10)


@pytest.mark.parametrize("stride, last", [(64, 0), (64, 70), (16, 3)])
def test_delta_shifts_by_what_the_blocks_first_query_lacked(stride, last):
    n, m = 200, 777
    q, k, v, plan = case(n, m)
    sparse, lse = attend(q, k, v, plan, SCALE)
    dense, dense_lse = attend(q, k, v, everything(n, m), SCALE)
    out, out_lse = delta(sparse, lse, q, k, v, SCALE, stride, last)
    for i in range(n):
        first = i - i % stride
        exact = i >= n - last or i == first
        wanted = dense[:, i] if exact else sparse[:, i] + dense[:, first] - sparse[:, first]
        np.testing.assert_allclose(out[:, i], wanted, atol=1e-10)
        np.testing.assert_allclose(out_lse[:, i], (dense_lse if exact else lse)[:, i], atol=1e-10)


def test_delta_looks_at_nothing_that_comes_later():
    n, m, cut = 200, 400, 130
    q, k, v, plan = case(n, m)
    changed = [x.copy() for x in (k, v)]
    for x in changed:
        x[:, m - n + cut:] = RNG.standard_normal(x[:, m - n + cut:].shape)
    first, second = (delta(*attend(q, *kv, plan, SCALE), q, *kv, SCALE)[0] for kv in ((k, v), changed))
    np.testing.assert_array_equal(first[:, :cut], second[:, :cut])
    assert (first[:, cut:] != second[:, cut:]).any()


def test_attention_of_some_rows_is_that_of_all():
    q, k, v, _ = case(100, 333)
    for got, wanted in zip(attend_rows(q, k, v, np.array([0, 7, 99]), SCALE), attend(q, k, v, everything(100, 333), SCALE)):
        np.testing.assert_allclose(got, wanted[:, [0, 7, 99]], atol=1e-10)


# ---- the zeroth-order tail -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, m", SHAPES)
def test_a_tail_of_no_pages_changes_nothing(n, m):
    q, k, v, _ = case(n, m)
    dense = attend(q, k, v, everything(n, m), SCALE)
    for got, wanted in zip(tail(*dense, q, k, v, everything(n, m), SCALE), dense):
        np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("n, m", SHAPES)
def test_a_tail_over_pages_of_equal_keys_is_dense(n, m):
    q, k, v, plan = case(n, m)
    k = np.repeat(k[:, ::PAGE], PAGE, 1)[:, :m]  # values differ: their mean is exact all the same
    for got, wanted in zip(tail(*attend(q, k, v, plan, SCALE), q, k, v, plan, SCALE), attend(q, k, v, everything(n, m), SCALE)):
        np.testing.assert_allclose(got, wanted, atol=1e-9)


@pytest.mark.parametrize("columns", [0.0, 0.01, 0.2])
def test_a_tail_equals_attention_with_mean_keys(columns):
    n, m = 150, 400
    q, k, v, plan = case(n, m, 0.2, columns)
    got, lse = tail(*attend(q, k, v, plan, SCALE), q, k, v, plan, SCALE)
    mask = plan.mask()
    for head, i in itertools.product(range(4), RNG.integers(0, n, 25)):
        keys, values = (x[head // 2].astype(np.float64) for x in (k, v))
        own = mask[head, i]
        scores, seen, counts = [keys[own] @ q[head, i].astype(np.float64) * SCALE], [values[own]], [np.ones(own.sum())]
        for page in range(m // PAGE):
            inside = np.arange(page * PAGE, page * PAGE + PAGE)
            if inside[-1] <= m - n + i and not own[inside].any():
                scores.append([keys[inside].mean(0) @ q[head, i].astype(np.float64) * SCALE])
                seen.append(values[inside].mean(0)[None])
                counts.append([PAGE])
        weights = np.exp(np.concatenate(scores)) * np.concatenate(counts)
        np.testing.assert_allclose(got[head, i], weights @ np.concatenate(seen) / weights.sum(), atol=1e-8)
        np.testing.assert_allclose(lse[head, i], np.log(weights.sum()), atol=1e-8)


def test_a_tail_serves_plans_by_kv_head_and_lies_between_sparse_and_dense():
    q, k, v, plan = case(300, 1000, heads=8)
    joined = plan.union(2)
    repeated = PrefillPlan(np.repeat(joined.blocks, 4, 0), None, 300, 1000)
    sparse = attend(q, k, v, joined, SCALE)
    out, lse = tail(*sparse, q, k, v, joined, SCALE)
    np.testing.assert_allclose(out, tail(*sparse, q, k, v, repeated, SCALE)[0], atol=1e-12)
    assert (lse >= sparse[1]).all() and (lse <= attend(q, k, v, everything(300, 1000, 8), SCALE)[1] + 1e-9).all()


def test_a_tail_of_weights_beyond_exp_is_finite():
    q, k, v, plan = case(100, 500)
    q[:, 10:40] *= 1e3
    q[:, 50:60] = 0
    assert all(np.isfinite(x).all() for x in tail(*attend(q, k, v, plan, SCALE), q, k, v, plan, SCALE))


# ---- MoA -------------------------------------------------------------------------------------------------------------
def test_spans_are_alpha_tokens_and_beta_of_what_a_block_sees():
    n, m = 200, 1000
    assets = {"alpha": np.array([[0, -300, 200, 5000]]), "beta": np.array([[0.25, 0.5, 0.0, 0.0]])}
    q, k, _ = structured(RNG, 4, 2, m, 64)
    plan = Moa(sink=1, recent=0).select(q[:, m - n:], k, SCALE, 0, assets)
    for head, block in itertools.product(range(4), range(4)):
        end = m - n + min(n, block * 64 + 64)
        first = end - np.floor(assets["alpha"][0, head] + assets["beta"][0, head] * end)
        wanted = [page == 0 or page * PAGE + PAGE > min(first, end - min(64, n - block * 64)) for page in range(-(-end // PAGE))]
        np.testing.assert_array_equal(plan.blocks[head, block, :len(wanted)], wanted)


def test_a_span_does_not_depend_on_how_a_prompt_is_cut():
    q, k, _ = structured(RNG, 2, 1, 512, 64)
    whole, last = Moa(alpha=-30, beta=0.4).select(q, k, SCALE), Moa(alpha=-30, beta=0.4).select(q[:, 256:], k, SCALE)
    np.testing.assert_array_equal(whole.blocks[:, 4:], last.blocks)


def test_calibration_gives_long_spans_to_heads_that_look_far():
    prompts = []
    for m in (1024, 2048):
        q, k = 0.1 * RNG.standard_normal((4, 256, 64), np.float32), 0.1 * RNG.standard_normal((2, m, 64), np.float32)
        for head, back in enumerate((20, m // 2, 20, 20)):  # keys that a query looks up: that many tokens before it
            key = 6 * RNG.standard_normal((256, 64)).astype(np.float32)
            k[head // 2, m - 256 - back:m - back] += key
            q[head] += key
        prompts.append((q, k, RNG.standard_normal((2, m, 64), np.float32)))
    q, k, v = map(list, zip(*prompts))
    found = Moa.calibrate(q, k, v, SCALE, density=0.4)
    assert found["alpha"].shape == found["beta"].shape == (4,) and found["alpha"].dtype == np.float32
    spans = found["alpha"] + found["beta"] * np.array([[1024], [2048]])
    assert (spans[:, 1] >= [513, 1025]).all() and (spans[:, [0, 2, 3]] < [[500], [1000]]).all()
    plans = [Moa().select(*prompt[:2], SCALE, 0, {name: x[None] for name, x in found.items()}) for prompt in prompts]
    assert np.mean([plan.density() for plan in plans]) <= 0.4 + 1e-6
    even = [Moa(beta=0.4).select(*prompt[:2], SCALE) for prompt in prompts]
    dense = [attend(*p, everything(256, p[1].shape[1]), SCALE)[0] for p in prompts]
    errors = [[np.linalg.norm(attend(*p, plan, SCALE)[0] - x) for p, plan, x in zip(prompts, some, dense)] for some in (plans, even)]
    assert sum(errors[0]) < 0.5 * sum(errors[1])


def test_losses_are_those_of_the_plans():
    q, k, v = structured(RNG, 4, 2, 700, 64)
    q, spans = q[:, -100:], np.array([(0, 0.2), (64, 0.5), (0, 1)])
    lost, read = losses([q], [k], [v], SCALE, spans)
    dense = attend(q, k, v, everything(100, 700), SCALE)[0]
    for i, (alpha, beta) in enumerate(spans):
        plan = Moa(alpha=alpha, beta=beta).select(q, k, SCALE)
        wanted = ((attend(q, k, v, plan, SCALE)[0] - dense) ** 2).sum((1, 2)) / (dense ** 2).sum((1, 2))
        np.testing.assert_allclose(lost[:, i], wanted, rtol=1e-3, atol=1e-9)
        assert read[i] == pytest.approx(plan.density())


def test_the_knapsack_is_within_one_step_of_the_best():
    for _ in range(20):
        read = np.sort(RNG.random(5))
        lost = RNG.random((4, 5)) * (1 + RNG.integers(0, 3, (4, 1)))
        density = RNG.uniform(read[0], 1)
        found = assign(lost, read, density)
        assert read[found].mean() <= density + 1e-9 or (found == 0).all()
        choices = np.array(list(itertools.product(range(5), repeat=4)))
        allowed = choices[read[choices].mean(1) <= density]
        best = lost[np.arange(4), allowed].sum(1).min()
        got, largest = lost[np.arange(4), found].sum(), (lost.max(1) - lost.min(1)).max()
        assert best - 1e-12 <= got <= best + largest  # a linear relaxation leaves one step undone
    np.testing.assert_array_equal(assign(lost, read, 2.0), lost.argmin(1))


def test_spans_come_from_the_models_calibration(tmp_path):
    assert Moa().load(tmp_path, CONFIG) is None
    spans = RNG.random((2, 4, 2)).astype(np.float32)
    calibration.save(tmp_path / calibration.FILE, CONFIG, {NAME: spans}, {NAME: {}})
    np.testing.assert_array_equal(Moa().load(tmp_path, CONFIG)["beta"], spans[..., 1])
    calibration.save(tmp_path / calibration.FILE, CONFIG, {NAME: spans[1:]}, {NAME: {}})
    with pytest.raises(ValueError, match="calibrate again"):
        Moa().load(tmp_path, CONFIG)


# ---- SeerAttention ---------------------------------------------------------------------------------------------------
def tables(positions, half, factor):
    angle = np.arange(positions)[:, None] * 100.0 ** (-np.arange(half) / half)
    return (factor * np.cos(angle)).astype(np.float32), (factor * np.sin(angle)).astype(np.float32)


@pytest.mark.parametrize("n, m", [(256, 512), (100, 700), (1, 65), (300, 333)])
@pytest.mark.parametrize("interleaved, half, factor", [(False, 32, 1.0), (True, 16, 1.2)])
def test_the_gate_is_that_of_pooled_queries_and_keys_before_rotation(n, m, interleaved, half, factor):
    heads, kv_heads, depth, width = 4, 2, 64, 128
    q, k = RNG.standard_normal((heads, n, depth), np.float32), RNG.standard_normal((kv_heads, m, depth), np.float32)
    (cos, sin), (gate_cos, gate_sin) = tables(m, half, factor), tables(m, width // 2, 1)
    assets = {"cos": cos, "sin": sin, "interleaved": interleaved, "gate_cos": gate_cos, "gate_sin": gate_sin,
              "gate_q": 0.3 * RNG.standard_normal((1, heads, depth, width), np.float32),
              "gate_k": 0.3 * RNG.standard_normal((1, kv_heads, 3 * depth, width), np.float32)}
    rotated = [rotate(x.swapaxes(0, 1), cos[p], sin[p], interleaved).swapaxes(0, 1) for x, p in ((q, slice(m - n, m)), (k, slice(0, m)))]
    policy = SeerAttention(fraction=0.3)
    plan = policy.select(*rotated, SCALE, 0, assets)
    for head in range(heads):
        got = policy.gate(rotated[0][head:head + 1], rotated[1][head // 2], 0, head // 2,
                          assets | {"gate_q": np.repeat(assets["gate_q"][:, head:head + 1], heads, 1)})[0]
        for block in range(-(-n // QUERIES)):
            end = m - n + min(n, block * QUERIES + QUERIES)
            a = q[head, block * QUERIES:block * QUERIES + QUERIES].mean(0) @ assets["gate_q"][0, head]
            a, scores = turned(a, m - n + block * QUERIES, gate_cos, gate_sin), []
            for start in range(0, m, 64):
                part = k[head // 2, start:start + 64]
                b = np.concatenate([part.max(0), part.min(0), part.mean(0)]) @ assets["gate_k"][0, head // 2]
                scores.append(a @ turned(b, start, gate_cos, gate_sin) / width ** 0.5 if min(start + 64, m) <= end else -np.inf)
            wanted = np.exp(scores - np.max(scores)) if np.isfinite(scores).any() else np.zeros(len(scores))
            wanted = wanted / max(wanted.sum(), 1e-30)
            np.testing.assert_allclose(got[block], wanted, atol=2e-4)
            count = int(np.ceil(0.3 * np.isfinite(scores).sum()))
            top = {2 * u + i for u in np.argsort(-wanted)[:count] for i in range(2) if (2 * u + i) * PAGE < end}
            if count and (count == np.isfinite(scores).sum() or np.diff(-np.sort(-wanted))[count - 1] < -1e-3):  # no near tie
                assert set(np.flatnonzero(plan.blocks[head, block])) == top | set(np.flatnonzero(forced(n, m, 1, 2)[block]))


def turned(x, position, cos, sin):
    half = cos.shape[1]
    c, s = cos[position].astype(np.float64), sin[position].astype(np.float64)
    return np.concatenate([x[:half] * c - x[half:] * s, x[half:] * c + x[:half] * s])


def test_rotation_is_undone_with_its_factor():
    x = RNG.standard_normal((3, 50, 64), np.float32)
    for interleaved, half in ((False, 32), (True, 32), (False, 10)):
        cos, sin = tables(4000, half, 1.3)
        places = np.arange(3950, 4000)
        turned_x = rotate(x.swapaxes(0, 1), cos[places], sin[places], interleaved).swapaxes(0, 1)
        assert np.abs(turned_x - x).max() > 1
        np.testing.assert_allclose(unrotate(turned_x, cos, sin, interleaved, places), x, atol=1e-5)


def test_a_gate_finds_blocks_by_threshold_and_no_later_key_counts():
    n, m, cut = 256, 600, 600 - 256 + 128  # blocks of queries and of keys do not line up
    q, k, _ = structured(RNG, 2, 1, m, 64)
    assets, later = SeerAttention.example_assets(2, 1, 64), k.copy()
    later[:, cut:] = 30 * RNG.standard_normal(later[:, cut:].shape)
    policy = SeerAttention(threshold=0.12)
    plans = [policy.select(q[:, m - n:], keys, SCALE, 0, assets) for keys in (k, later)]
    np.testing.assert_array_equal(plans[0].blocks[:, :2], plans[1].blocks[:, :2])
    assert 0.05 < plans[0].density() < 0.95


def test_a_model_without_a_gate_is_refused_in_one_line(tmp_path):
    policy, (cos, sin) = load_policy("prefill", "seer_attention"), tables(300, 32, 1.5)
    node = helper.make_node("cached_attention", ["q", "k", "v", "cos", "sin"], ["o"], rotary_dim=40, interleaved=1)
    names = [numpy_helper.from_array(x, name) for name, x in (("cos", cos), ("sin", sin))]
    onnx.save(helper.make_model(helper.make_graph([node], "g", [], [], names)), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="needs a gate") as error:
        policy.load(tmp_path, CONFIG)
    assert "\n" not in str(error.value)
    gate = {"gate_q": RNG.random((2, 4, 64, 48), np.float32), "gate_k": RNG.random((2, 2, 192, 48), np.float32)}
    save_file(gate, tmp_path / FILE)
    assets = policy.load(tmp_path, CONFIG)
    np.testing.assert_array_equal(assets["cos"], cos[:, :20])
    q, k, _ = structured(RNG, 4, 2, 300, 64)
    assert assets["interleaved"] and 0 < policy.select(q[:, 200:], k, SCALE, 1, assets).density() <= 1
    save_file(gate | {"gate_k": gate["gate_k"][:, :, 1:]}, tmp_path / FILE)
    with pytest.raises(ValueError, match="gate_k must be"):
        policy.load(tmp_path, CONFIG)
    save_file({name: np.ascontiguousarray(x[..., :32]) for name, x in gate.items()}, tmp_path / FILE)
    with pytest.raises(ValueError, match="add gate_cos"):
        policy.load(tmp_path, CONFIG)
