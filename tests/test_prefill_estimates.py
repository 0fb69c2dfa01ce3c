"""Each method that estimates where softmax weight lies, against loops that say what its estimate means."""
import numpy as np
import pytest

from edgeattn.policies import load_policy
from edgeattn.kernels_cpu.antidiagonal_weights import antidiagonal_weights
from edgeattn.policies.prefill import sale, sparge_attn
from edgeattn.prefill_plan import PAGE, QUERIES, PrefillPlan, attend, causal, forced, partial_softmax, recall, softmax, spread
from edgeattn.reference.antidiagonal_weights import antidiagonals
from edgeattn.reference.score_excess import rounded
from prefill_driver import structured

RNG = np.random.default_rng()
SCALE = 0.125
SHAPES = [(512, 1536), (200, 1003), (64, 130), (130, 677), (1, 500)]  # (queries, keys)


def made(n, m, heads=2, kv_heads=1, depth=64):
    q, k, v = structured(RNG, heads, kv_heads, m, depth)
    return np.ascontiguousarray(q[:, m - n:]), k, v


def chosen(name, q, k, assets=None, layer=0, **options):
    return load_policy("prefill", name, options).select(q, k, SCALE, layer, assets)


def tiles(x):
    """Maxima of [heads, n, m] by query block and page; padded with -inf."""
    n, m = x.shape[1:]
    x = np.pad(x, ((0, 0), (0, -n % QUERIES), (0, -m % PAGE)), constant_values=-np.inf)
    return x.reshape(len(x), -1, QUERIES, x.shape[2] // PAGE, PAGE).max((2, 4))


def seen(n, m):
    return np.arange(m) <= np.arange(n)[:, None] + m - n


# ---- what SALE and AnchorAttention share -----------------------------------------------------------------------------
@pytest.mark.parametrize("n, m", SHAPES)
def test_partial_softmax_is_that_of_the_pages_named(n, m):
    q, k, _ = made(n, m)
    blocks = forced(n, m, 2, 1) | (RNG.random(causal(n, m).shape) < 0.2) & causal(n, m)
    top, total = partial_softmax(q, k[0], SCALE, blocks)
    plan = PrefillPlan(np.repeat(blocks[None], 2, 0), None, n, m)
    np.testing.assert_allclose(top + np.log(total), attend(q, k, k, plan, SCALE)[1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(top, np.where(plan.mask(), q @ k[0].T * SCALE, -np.inf).max(2), rtol=1e-5, atol=1e-5)


# ---- SALE ------------------------------------------------------------------------------------------------------------
def relative(q, k, scores, policy):
    """[heads, n, m]: the logarithm of SALE's relative attention score, of given scores."""
    n, m = q.shape[1], len(k)
    always = np.repeat(spread(forced(n, m, policy.sink, policy.recent), m), QUERIES, 0)[:n] & seen(n, m)
    exact = np.where(always, q.astype(np.float64) @ k.astype(np.float64).T * SCALE, -np.inf)
    top = exact.max(2, keepdims=True)
    return scores - top - np.log(np.exp(exact - top).sum(2, keepdims=True))


def less_mean(q, k):
    """As SALE rounds them: queries less their mean, keys less that of the chunk's first. -> q, k, the two means"""
    mean = k[-q.shape[1]:][:64].mean(0)
    q_mean = q.mean(1, keepdims=True)
    return (q - q_mean) * np.float32(SCALE), k - mean, q_mean.astype(np.float64), mean.astype(np.float64)


def estimate(q, k, levels):
    """[heads, n, m] in float64: scores as rounded queries and keys give them, up to what all keys of a row share."""
    rows, columns, q_mean, k_mean = less_mean(q, k)
    product = rounded(rows, levels).astype(np.float64) @ rounded(columns, levels).T
    return product + q_mean @ columns.T * SCALE + q.astype(np.float64) @ k_mean[:, None] * SCALE


def bound(q, k, levels):
    """[..., n, m]: how far a product of rounded rows may be from that of the rows."""
    steps = [np.abs(x).max(-1).astype(np.float64) / levels for x in (q, k)]
    found = steps[0][..., None] / 2 * np.abs(k).sum(-1) + np.abs(q).sum(-1)[..., None] * steps[1] / 2
    return (found + q.shape[-1] / 4 * steps[0][..., None] * steps[1]) * 1.0001


@pytest.mark.parametrize("bits, levels", [(4, 7), (8, 127)])
@pytest.mark.parametrize("n, m", SHAPES)
def test_sale_keeps_the_pages_with_a_pair_above_the_threshold(n, m, bits, levels):
    q, k, _ = made(n, m)
    policy, within = load_policy("prefill", "sale"), bound(*less_mean(q, k[0])[:2], levels)
    found = tiles(relative(q, k[0], estimate(q, k[0], levels), policy))
    exact = relative(q, k[0], q.astype(np.float64) @ k[0].astype(np.float64).T * SCALE, policy)
    least, most = tiles(exact - within), tiles(exact + within)
    asked = (causal(n, m) & ~forced(n, m, 1, 2)) & np.isfinite(found)
    for threshold in np.exp(np.quantile(found[asked], (0.2, 0.6, 0.95)) if asked.any() else [0]):
        limit = np.log(max(threshold, sale.DENSE))
        plan = chosen("sale", q, k, threshold=float(max(threshold, sale.DENSE)), bits=bits)
        clear = asked & (np.abs(found - limit) > 1e-3)
        np.testing.assert_array_equal(plan.blocks[clear], (found > limit)[clear])
        assert plan.blocks[asked & (least > limit)].all() and not plan.blocks[asked & (most < limit)].any()


@pytest.mark.parametrize("levels", [7, 127])
def test_a_score_of_few_bits_is_within_its_bound(levels):
    q, k, _ = made(300, 900, depth=128)
    q, k = q[0] - q[0].mean(0), k[0] - k[0].mean(0)
    codes = rounded(q, levels) / (np.abs(q).max(1, keepdims=True) / levels)
    np.testing.assert_allclose(codes, np.rint(codes), rtol=0, atol=1e-4)
    assert np.abs(codes).max() < levels + 1e-3 and np.abs(rounded(q, levels) - q).max() <= np.abs(q).max() / levels / 2 * 1.0001
    wrong, within = np.abs(rounded(q, levels).astype(np.float64) @ rounded(k, levels).T - q.astype(np.float64) @ k.T), bound(q, k, levels)
    assert (wrong <= within).all() and wrong.max() > within.min() / 100


def test_means_of_queries_and_keys_cost_no_accuracy():
    q, k, _ = made(512, 2048)
    shift = RNG.standard_normal((2, 64)).astype(np.float32) * 8
    plans = [chosen("sale", q + a * shift[0], k + b * shift[1], threshold=3.0).blocks for a, b in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert (plans[0] != plans[1]).mean() < 0.002 and (plans[2] != plans[3]).mean() < 0.002
    policy, asked = load_policy("prefill", "sale"), causal(512, 2048) & ~forced(512, 2048, 1, 2)
    for plan, a in ((plans[0], 0), (plans[3], 1)):
        moved = (q + a * shift[0]).astype(np.float64)
        exact = tiles(relative(moved, k[0], moved @ k[0].astype(np.float64).T * SCALE, policy)) > np.log(3.0)
        assert (plan != exact)[:, asked].mean() < 0.2


def test_each_head_has_the_threshold_of_its_calibration():
    q, k, _ = made(256, 1024, heads=6, kv_heads=2)
    thresholds = np.full((3, 6), 1e3, np.float32)
    thresholds[1, 4], thresholds[1, 1] = 0, 0.5
    plan = chosen("sale", q, k, {"sale_thresholds": thresholds}, layer=1)
    alone = chosen("sale", q, k, threshold=0.5)
    assert (plan.blocks[4] == causal(256, 1024)).all() and (plan.blocks[1] == alone.blocks[1]).all()
    assert not (plan.blocks[[0, 2, 3, 5]] == causal(256, 1024)).all((1, 2)).any()


def test_calibrated_thresholds_keep_the_error_below_what_is_asked():
    prompts = [made(128, 800, heads=4, kv_heads=2) for _ in range(2)]
    for q, k, _ in prompts:
        q[..., 0], k[0, -192:, 0] = 0, 20
        q[0] = 10 * (np.arange(64) == 0)                                       # sees nothing but what is near
    q, k, v = zip(*prompts)
    found = load_policy("prefill", "sale").calibrate(q, k, v, SCALE, start=8.0, error=4.0)["sale_thresholds"]
    first = load_policy("prefill", "sale").calibrate(q[:1], k[:1], v[:1], SCALE, start=8.0, error=4.0)["sale_thresholds"]
    assert found.shape == (4,) and found[0] == 8 and (found <= first).all() and found.min() < 8
    halvings = np.log2(8 / found[found > 0])
    np.testing.assert_array_equal(halvings, np.rint(halvings))

    def errors(i, thresholds):
        plan, n = chosen("sale", q[i], k[i], {"sale_thresholds": thresholds[None]}), 128
        whole = PrefillPlan(np.ones_like(plan.blocks), None, n, 800)
        return np.abs(attend(q[i], k[i], v[i], plan, SCALE)[0] - attend(q[i], k[i], v[i], whole, SCALE)[0]).sum((1, 2)) / n
    assert max(errors(0, found).max(), errors(1, found).max()) < 4
    assert (np.maximum(errors(0, found * 2), errors(1, found * 2)) >= 4)[(found > 0) & (found < 8)].all()


# ---- XAttention ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, m, stride", [(64, 96, 8), (70, 133, 16), (33, 40, 4), (5, 77, 8), (1, 9, 8), (96, 96, 32), (20, 50, 1)])
def test_antidiagonals_are_the_means_of_what_the_mask_leaves(n, m, stride):
    q, k = (RNG.integers(-126, 127, (heads, tokens, 16)).astype(np.float32) for heads, tokens in ((2, n), (1, m)))
    q[..., 3], k[..., 5], mean = 127, -127, RNG.integers(-9, 9, (1, 16)).astype(np.float32)  # nothing is left to round
    k += mean[:, None]
    found = antidiagonals(q, k, mean, stride)
    assert found.shape == (2, -(-n // stride), -(-m // stride))
    for u in range(found.shape[1]):
        rows = [min(u * stride + stride - 1 - t, n - 1) for t in range(stride)]
        shift = np.mean([q[:, i] @ mean[0] for i in rows], 0)
        for w in range(found.shape[2]):
            pairs = [(i, w * stride + t) for t, i in enumerate(rows) if w * stride + t <= i + m - n]
            exact = [q[:, i] @ k[0, j] for i, j in pairs]
            np.testing.assert_allclose(found[:, u, w], np.mean(exact, 0) - shift if pairs else -np.inf, rtol=1e-4, atol=0.05)


def test_xattention_with_strides_of_one_knows_the_weights_to_8_bits():
    q, k, _ = made(200, 700)
    exact = softmax(np.where(seen(200, 700), q.astype(np.float64) @ k[0].astype(np.float64).T * SCALE, -np.inf))
    exact = np.add.reduceat(np.add.reduceat(exact, np.arange(0, 700, PAGE), 2), np.arange(0, 200, QUERIES), 1)
    mean = k[:, -200:].mean(1)
    found = antidiagonal_weights(q, k, mean, scale=SCALE, stride=1)
    within = 2 * bound(q * SCALE, k[0] - mean[0], 127).max()
    allowed = np.broadcast_to(causal(200, 700), exact.shape)
    assert np.abs(np.log(found[allowed]) - np.log(exact[allowed])).max() < min(within, 0.2)
    assert not found[~allowed].any()
    plan = chosen("xattention", q, k, tau=0.8, stride=1)
    assert all(recall(q, k, plan, SCALE)[:, i:i + QUERIES].mean() > 0.79 for i in range(0, 200, QUERIES))


def test_xattention_does_not_look_at_later_keys():
    q, k, _ = made(256, 801)
    other = k.copy()
    other[:, -64:] = RNG.standard_normal((1, 64, 64)) * 9
    plans = [chosen("xattention", q, x, tau=0.7).blocks for x in (k, other)]
    np.testing.assert_array_equal(plans[0][:, :3], plans[1][:, :3])


# ---- SpargeAttn ------------------------------------------------------------------------------------------------------
def test_self_similarity_is_the_mean_cosine_of_all_pairs():
    x = made(80, 100)[1][0] + 0.3
    x[3] = 0
    found = sparge_attn.self_similarity(x, PAGE)
    for page in range(4):
        rows = x[page * PAGE:(page + 1) * PAGE]
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
        assert found[page] == pytest.approx((unit @ unit.T).mean(), abs=1e-5)


def test_what_a_mean_does_not_stand_for_is_read():
    q, k = np.ones((1, 256, 64), np.float32), np.ones((1, 1024, 64), np.float32)
    q, k = q + 0.1 * RNG.standard_normal(q.shape, np.float32), k * RNG.choice([-1, 1], (1, 32, 64)).repeat(PAGE, 1).astype(np.float32)
    k[0, 320:352:2] *= -1                                                           # page 10 cancels out
    k += 5                                                                          # what all keys share makes none alike
    plan = chosen("sparge_attn", q, k, fraction=0.1, similarity=0.5)
    assert plan.blocks[:, :, 10].all() and plan.density() < 0.4
    q[0, 64:128:2] *= -1                                                            # and so does block 1
    np.testing.assert_array_equal(chosen("sparge_attn", q, k, fraction=0.1, similarity=0.5).blocks[0, 1], causal(256, 1024)[1])


def test_sparge_attn_reads_as_much_as_it_is_asked_to_and_ignores_the_mean_key():
    q, k, _ = made(512, 2048)
    policy, allowed = load_policy("prefill", "sparge_attn", {"fraction": 0.2}), causal(512, 2048)
    found = policy.choose(q, k[0], SCALE, 0, 0, None)
    np.testing.assert_array_equal(found.sum(2), np.broadcast_to(np.ceil(0.2 * allowed.sum(1)), (2, 8)))
    moved = policy.choose(q, k[0] + RNG.standard_normal(64).astype(np.float32), SCALE, 0, 0, None)
    assert (found != moved).mean() < 0.01
    policy = load_policy("prefill", "sparge_attn", {"mode": "cdf", "cdf": 0.6})
    found = policy.choose(q, k[0], SCALE, 0, 0, None)
    means = q.reshape(2, 8, 64, 64).mean(2) @ (k[0] - k[0].mean(0)).reshape(64, 32, 64).mean(1).T
    weights = softmax(np.where(allowed, means * SCALE, -np.inf))
    covered = np.where(found, weights, 0).sum(2)
    least = np.where(found, weights, 2).min(2)
    assert (covered > 0.6 - 1e-4).all() and (covered - least < 0.6 + 1e-4).all()


def test_a_calibrated_head_reads_the_fewest_pages_that_keep_its_error():
    prompts = [made(128, 800, heads=4, kv_heads=2) for _ in range(2)]
    for q, k, _ in prompts:
        q[..., 0], k[0, -192:, 0] = 0, 20
        q[0] = 10 * (np.arange(64) == 0)                                       # sees nothing but what is near
        q[3] = 0                                                               # sees everything
    q, k, v = zip(*prompts)
    policy = load_policy("prefill", "sparge_attn")
    found = policy.calibrate(q, k, v, SCALE, error=0.3, similarities=(0.9, 0.0))["sparge_attn"]
    assert found.shape == (4, 2) and tuple(found[3]) == (1, 1) and found[0, 1] < 0.01

    def measured(i, assets):
        plan = chosen("sparge_attn", q[i], k[i], {"sparge_attn": assets[None]})
        exact = attend(q[i], k[i], v[i], PrefillPlan(np.ones_like(plan.blocks), None, 128, 800), SCALE)[0]
        return np.abs(attend(q[i], k[i], v[i], plan, SCALE)[0] - exact).sum((1, 2)) / np.abs(exact).sum((1, 2)), plan.blocks.mean((1, 2))
    errors, read = np.array([measured(i, found) for i in range(2)]).swapaxes(0, 1)
    assert (errors < 0.3).all() and (read[:, 3] == causal(128, 800).mean()).all() and (read[:, 0] < 0.3).all()
    tight = policy.calibrate(q, k, v, SCALE, error=0.05, similarities=(0.9, 0.0))["sparge_attn"]
    assert (np.array([measured(i, tight)[1] for i in range(2)]).sum(0) >= read.sum(0)).all()


# ---- AnchorAttention -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [1, 2, 8])
@pytest.mark.parametrize("n, m", SHAPES)
def test_anchor_reads_the_keys_that_come_within_theta_of_what_is_read_anyhow(n, m, step):
    q, k, _ = made(n, m)
    policy, past = load_policy("prefill", "anchor", {"theta": 2.0, "step": step}), m - n
    blocks, columns = policy.choose(q, k[0], SCALE, 0, 0, None)
    scores = np.where(seen(n, m), q @ k[0].T * SCALE, -np.inf)
    for first in range(0, n, step * QUERIES):
        start = max(((past + first) // PAGE - policy.recent) * PAGE, 0)
        stop = min(first + step * QUERIES, n)
        near = np.zeros((2, m), bool)
        for block in range(first, stop, QUERIES):
            rows, region = slice(block, min(block + QUERIES, stop)), np.r_[0:min(PAGE, m), max(start, PAGE):m]
            anchor = scores[:, rows][..., region].max(2).mean(1)
            difference = q[:, rows].mean(1) @ k[0].T * SCALE + 2 - anchor[:, None]
            near |= difference > 0
            near[np.abs(difference) < 1e-4] = columns[:, block // QUERIES][np.abs(difference) < 1e-4]
        between = (np.arange(m) >= PAGE) & (np.arange(m) < start)
        for block in range(first, stop, QUERIES):
            np.testing.assert_array_equal(columns[:, block // QUERIES], near & between)
            whole = (np.arange(blocks.shape[2]) * PAGE >= start) | (np.arange(blocks.shape[2]) < 1)
            assert (blocks[:, block // QUERIES] == whole & causal(n, m)[block // QUERIES]).all()


def test_anchor_finds_a_single_key_and_reads_it_alone():
    q, k, _ = made(256, 1024)
    topic = RNG.standard_normal(64).astype(np.float32)
    q, k[0, 300] = q + topic, 6 * topic
    tight = chosen("anchor", q, k, theta=-np.inf)
    plan = chosen("anchor", q, k, theta=0.0)
    assert not tight.columns.any() and plan.columns[:, :, 300].all() and not plan.blocks[:, :, 300 // PAGE].any()
    assert plan.columns.sum() < 0.1 * plan.columns.size


# ---- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, options", [("xattention", {"stride": 12}), ("sparge_attn", {"mode": "best"}), ("dhsa", {"mode": "top"}),
                                           ("anchor", {"step": 0}), ("dhsa_chunks", {"budget": 0}), ("dhsa_chunks", {"chunk": 0}),
                                           ("sale", {"bits": 5})])
def test_options_out_of_range_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load_policy("prefill", name, options)
