"""Methods that choose what a prompt reads by patterns, samples, proxies, permutations and trees: what each of them promises."""
import numpy as np
import pytest

from edgeattn.policies import load_policy
from edgeattn.policies.prefill.flex_prefill import divergence
from edgeattn.policies.prefill.minference import A_SHAPE, BLOCK_SPARSE, VERTICAL_SLASH
from edgeattn.prefill_plan import PAGE, QUERIES, by_distance, causal, ends, forced, recall, slash_pages, spread, true_weights
from prefill_driver import structured

RNG = np.random.default_rng()
SCALE = 64 ** -0.5
SHAPES = [(100, 100), (33, 500), (200, 1003), (1, 70), (130, 161), (512, 1536)]  # (queries, keys)


def made(n, m, heads=4, kv_heads=1):
    q, k, v = structured(RNG, heads, kv_heads, m, 64)
    return q[:, m - n:], k, v


def dense(q, k):
    """[heads, n, m] float64: the softmax of a group's queries over k [m, d]."""
    n, m = q.shape[1], len(k)
    scores = np.where(np.arange(m) <= np.arange(n)[:, None] + m - n, q.astype(np.float64) @ k.T.astype(np.float64) * SCALE, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def select(method, options, q, k, assets=None):
    return load_policy("prefill", method, options).select(q, k, SCALE, 0, assets)


def pages_of(x, n, m):
    """[heads, n, m] bool as [heads, query blocks, pages]: where any is."""
    return np.logical_or.reduceat(np.logical_or.reduceat(x, np.arange(0, m, PAGE), 2), np.arange(0, n, QUERIES), 1)


def orthogonal(count, length=8.0):
    """[count, 64] float32 directions that do not look alike."""
    return length * np.linalg.qr(RNG.standard_normal((64, 64)))[0][:count].astype(np.float32)


# ---- what several of them share ------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, m", SHAPES)
def test_sampled_weights_and_diagonals_are_those_of_dense_attention(n, m):
    q, k, _ = made(n, m)
    rows = np.sort(RNG.choice(n, min(n, 7), replace=False))
    weights, whole = true_weights(q, k[0], rows, SCALE), dense(q, k[0])[:, rows]
    np.testing.assert_allclose(weights, whole, atol=1e-5)
    wanted = np.zeros((len(q), m))
    for i, row in enumerate(rows):
        for key in range(m - n + row + 1):
            wanted[:, m - n + row - key] += whole[:, i, key]
    np.testing.assert_allclose(by_distance(weights, m - n + rows), wanted, atol=1e-5)


@pytest.mark.parametrize("n, m", SHAPES)
def test_pages_of_distances_are_all_that_a_query_of_the_block_reaches_and_no_more(n, m):
    slashes = RNG.random((3, m)) < 3 / m
    distance = (m - n + np.arange(n))[:, None] - np.arange(m)
    wanted = pages_of(np.where(distance >= 0, slashes[:, np.maximum(distance, 0)], False), n, m)
    np.testing.assert_array_equal(slash_pages(slashes, n, m), wanted)


# ---- MInference ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, m", SHAPES)
def test_minference_equals_its_definition(n, m):
    q, k, _ = made(n, m)
    rows = np.arange(max(0, n - 64), n)
    weights, n_v, n_s = true_weights(q, k[0], rows, SCALE), 60, 110
    verticals, slashes = np.zeros((2, len(q), m), bool)
    for head in range(len(q)):
        by_key, by_slash = weights[head].sum(0), by_distance(weights, m - n + rows)[head]
        by_key[:30], by_slash[:100] = np.inf, np.inf
        verticals[head, np.argsort(-by_key, kind="stable")[:n_v]] = True
        slashes[head, np.argsort(-by_slash, kind="stable")[:n_s]] = True
    pages = slash_pages(slashes, n, m) & causal(n, m) | forced(n, m, 1, 2)
    found = select("minference", {"n_v": n_v, "n_s": n_s}, q, k)
    np.testing.assert_array_equal(found.blocks, pages)
    np.testing.assert_array_equal(found.columns, verticals[:, None] & ~spread(pages, m) & (np.arange(m) < ends(n, m)[:, None]))


def test_minference_gives_each_head_its_own_pattern():
    q, k, _ = made(200, 2000, 4, 2)
    patterns = np.array([[A_SHAPE, 90, 300], [VERTICAL_SLASH, 10 ** 6, 0], [BLOCK_SPARSE, 320, 0], [A_SHAPE, 0, 0]])
    plan = select("minference", {"recent": 0}, q, k, {"patterns": patterns[None]})
    distance = np.arange(1800, 2000)[:, None] - np.arange(2000)
    a_shape = (distance >= 0) & (distance < 300)
    np.testing.assert_array_equal(plan.blocks[0], pages_of(a_shape[None], 200, 2000)[0] | forced(200, 2000))
    assert plan.mask()[0, :, :90].all() and not plan.mask()[0, :, 96:1400].any()
    np.testing.assert_array_equal(plan.mask()[1], distance >= 0)
    assert not plan.columns[2].any() and (10 <= plan.blocks[2].sum(1)).all() and (plan.blocks[2].sum(1) <= 10 + 4).all()
    np.testing.assert_array_equal(plan.blocks[3], forced(200, 2000))


def test_minference_calibration_finds_the_pattern_that_a_head_has():
    m, topics = 1024, orthogonal(17)
    k = 0.1 * RNG.standard_normal((1, m, 64), np.float32)
    k[0, RNG.choice(np.arange(100, 500), 60, replace=False)] += topics[0]      # head 0 reads a few keys, wherever they are
    q = np.zeros((3, m, 64), np.float32)
    q[0] = topics[0]
    for block in range(m // QUERIES):                                           # head 1: a page of its own for each block of queries
        page = RNG.integers(0, max(1, 2 * block - 1))
        k[0, page * PAGE:(page + 1) * PAGE] += topics[1 + block]
        q[1, block * QUERIES:(block + 1) * QUERIES] = topics[1 + block]
    prompts = [x[:, 512:] for x in (q, q)], [k, k], [k, k]
    calibrate = type(load_policy("prefill", "minference")).calibrate
    candidates = (A_SHAPE, 64, 256), (VERTICAL_SLASH, 128, 50), (BLOCK_SPARSE, 128, 0)
    patterns = calibrate(*prompts, SCALE, candidates, length=m)["patterns"]
    assert patterns.shape == (3, 3) and patterns[0].tolist() == [VERTICAL_SLASH, 128, 50] and patterns[1].tolist() == [BLOCK_SPARSE, 128, 0]
    own, other = (recall(q[:2, 512:], k, select("minference", {}, q[:2, 512:], k, {"patterns": x[None]}), SCALE).mean(1)
                  for x in (patterns[:2], patterns[1::-1]))
    assert (own > other + 0.3).all()
    assert (calibrate(*prompts, SCALE, candidates, length=2 * m)["patterns"][:, 1] <= 64).all()  # half as long, half as much
    least = calibrate(*prompts, SCALE, ((A_SHAPE, 64, 500), (A_SHAPE, 32, 0)), length=m, density=0.0)["patterns"]
    assert (least == [A_SHAPE, 32, 0]).all()                                    # all read more than they should: the one that reads least


# ---- SampleAttention -----------------------------------------------------------------------------------------------
def test_sample_attention_covers_of_sampled_queries_what_it_promises():
    q, k, _ = made(512, 2048)
    for part in (0.5, 0.9):
        plan = select("sample_attention", {"columns": part, "slashes": 0.0}, q, k)
        found = recall(q, k, plan, SCALE).reshape(4, -1, 64)[:, :, -4:]
        assert (found.mean((1, 2)) >= part - 1e-5).all()
    assert recall(q, k, select("sample_attention", {}, q, k), SCALE).mean() > 0.9  # also of those not sampled, if by less


def test_sample_attention_finds_distances_that_few_samples_reach():
    m, near, far = 1024, 200, 900
    k = 2 * RNG.standard_normal((1, m, 64), np.float32)
    q = np.concatenate([np.roll(k, near, 1)[:, :far], np.roll(k, far, 1)[:, far:]], 1)  # what a query asks for stands so far behind it
    plan, rows = select("sample_attention", {"columns": 0.0, "slashes": 0.6, "recent": 0}, q, k), np.arange(m)
    assert plan.mask()[0, rows[far:], rows[far:] - far].all() and plan.mask()[0, rows[near:far], rows[near:far] - near].all()
    assert plan.density() < 0.6


# ---- FlexPrefill ---------------------------------------------------------------------------------------------------
def test_divergence_is_nothing_for_equals_and_log_2_for_strangers():
    p, q = (x / x.sum(1, keepdims=True) for x in RNG.random((2, 5, 40)))
    near = (p + 1e-8).astype(np.float32)
    assert (0 <= divergence(near, p.astype(np.float32))).all() and (divergence(near, p.astype(np.float32)) < 1e-6).all()
    np.testing.assert_allclose(divergence(p, q), divergence(q, p))
    np.testing.assert_allclose(divergence(np.eye(3)[:2], np.eye(3)[1:]), np.log(2))
    middle = (p + q) / 2
    np.testing.assert_allclose(divergence(p, q), ((p * np.log(p / middle)).sum(1) + (q * np.log(q / middle)).sum(1)) / 2)


def test_flex_prefill_trusts_the_estimate_where_means_tell_the_truth():
    m, topics = 1024, orthogonal(40)
    k = np.repeat(topics[RNG.permutation(m // PAGE)], PAGE, 0)[None]     # every page a topic, so that means are exact
    asked = RNG.integers(0, m // PAGE // 2, 8)
    q = np.repeat(2 * k[0, asked * PAGE], QUERIES, 0)[None]              # a page for each block, not those that the last one asks for
    aware = select("flex_prefill", {"budget": 32, "recent": 0}, q, k)
    assert aware.blocks[0, np.arange(8), asked].all() and aware.density() < 0.3
    never = select("flex_prefill", {"budget": 32, "recent": 0, "tau": 0.0}, q, k)
    assert recall(q, k, aware, SCALE).mean() > 0.9 > recall(q, k, never, SCALE).mean()


def test_flex_prefill_covers_gamma_of_the_last_queries_weight():
    q, k, _ = made(256, 2048)
    for gamma in (0.5, 0.9):
        plan = select("flex_prefill", {"gamma": gamma, "tau": 0.0, "budget": 32}, q, k)
        assert (recall(q, k, plan, SCALE)[:, -64:].mean(1) >= gamma - 1e-5).all()


# ---- ProxyAttn -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, m", [(200, 1003), (512, 1536), (64, 500)])
def test_proxy_attn_with_a_head_of_its_own_and_no_stride_ranks_as_true_weights_do(n, m):
    q, k, _ = made(n, m, 2, 2)
    plan = select("proxy_attn", {"stride": 1, "proxies": 9, "gamma": 0.5, "budget": 32, "recent": 0}, q, k)
    for head in range(2):
        weights = dense(q[head:head + 1], k[head])
        top = np.maximum.reduceat(np.maximum.reduceat(weights, np.arange(0, m, PAGE), 2), np.arange(0, n, QUERIES), 1)[0]
        mass = np.add.reduceat(weights[0, -min(n, (n - 1) % QUERIES + 1 if n < QUERIES else QUERIES):].sum(0), np.arange(0, m, PAGE))
        needed = (np.cumsum(-np.sort(-mass)) < 0.5 * mass.sum()).sum() + 1
        for block, allowed in enumerate(causal(n, m)):
            count = int(np.ceil(needed / len(mass) * allowed.sum() - 1e-9))
            wanted = np.zeros(len(mass), bool)
            wanted[np.argsort(np.where(allowed, -top[block], np.inf), kind="stable")[:count]] = True
            np.testing.assert_array_equal(plan.blocks[head, block], wanted | forced(n, m)[block])


def test_proxy_attn_reads_more_for_heads_that_look_around():
    m, topic = 2048, orthogonal(1)[0]
    k = 0.1 * RNG.standard_normal((1, m, 64), np.float32)
    k[0, 300:350] += topic
    q = np.broadcast_to(np.stack([topic, 0 * topic])[:, None], (2, 256, 64))
    counts = select("proxy_attn", {"budget": 64, "recent": 0}, q, k).blocks.sum(2)
    assert (counts[0] <= 8).all() and (counts[1] > 50).all()


# ---- PBS-Attn ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("n, m", [(200, 1003), (512, 1536)])
def test_pbs_attn_reads_whole_blocks_of_sorted_keys_and_its_own_segments(n, m):
    q, k, _ = made(n, m)
    plan = select("pbs_attn", {"tau": 0.5, "segment": 128, "rows": 64, "recent": 0}, q, k)
    seen = spread(plan.blocks, m) | plan.columns
    scores, partial = dense(q, k[0])[:, -64:].mean((0, 1)), 0
    for block in range(seen.shape[1]):
        own = (m - n + block * QUERIES) // 128 * 128
        assert seen[:, block, own:ends(n, m)[block]].all()
        for start in range(128, own, 128):                      # the first holds the forced page
            order = start + np.argsort(-scores[start:start + 128], kind="stable")
            chosen = seen[:, block][:, order].reshape(len(q), -1, PAGE)
            assert (chosen.any(2) == chosen.all(2)).all()
            partial += (chosen.any(2).any(1) & ~chosen.all((1, 2))).sum()
    assert partial and plan.columns.any()


def test_pbs_attn_gathers_keys_that_lie_scattered():
    m, topic = 4096, orthogonal(1)[0]
    k = 0.3 * RNG.standard_normal((1, m, 64), np.float32)
    k[0, RNG.choice(m, m // 16, replace=False)] += topic
    q = np.broadcast_to(topic, (2, 512, 64)) + RNG.standard_normal((2, 512, 64), np.float32)
    sorted_, plain = (select("pbs_attn", {"segment": size, "recent": 0}, q, k) for size in (1024, PAGE))
    assert recall(q, k, sorted_, SCALE).mean() > 0.75 and sorted_.density() < 0.6 * plain.density()


def test_pbs_attn_of_almost_all_reads_almost_all():
    q, k, _ = made(256, 1024)
    assert recall(q, k, select("pbs_attn", {"tau": 1 - 1e-7}, q, k), SCALE).min() > 0.9


# ---- HiP -----------------------------------------------------------------------------------------------------------
def test_hip_finds_the_best_pages_where_scores_change_slowly():
    m, peak = 8192, int(RNG.integers(1000, 6000))
    k, q = np.zeros((1, m, 64), np.float32), np.zeros((1, 256, 64), np.float32)
    k[0, :, 0], q[..., 0] = -np.abs(np.arange(m) - peak) / 100, 1
    plan = select("hip", {"keep": 8, "beam": 16, "sink": 1, "recent": 0}, q, k)
    wanted = np.argsort(np.abs(np.arange(m // PAGE) * PAGE + PAGE / 2 - peak))[:6]  # the outermost may go either way
    assert plan.blocks[0][:, wanted].all() and (plan.blocks[0].sum(1) <= 8 + 1 + 2).all()


@pytest.mark.parametrize("n, m", SHAPES)
def test_hip_with_a_beam_for_all_pages_is_a_scan_of_their_keys(n, m):
    q, k, _ = made(n, m)
    plan = select("hip", {"keep": 5, "beam": 10 ** 6, "stride": 1, "step": 1, "sink": 1, "recent": 0}, q, k)
    scores = q @ k[0].T
    for block, own in enumerate((m - n + np.arange(-(-n // QUERIES)) * QUERIES) // PAGE):
        top = scores[:, block * QUERIES:(block + 1) * QUERIES, :own * PAGE].max(1).reshape(4, own, PAGE).max(2)
        wanted = forced(n, m)[block] & np.ones((4, 1), bool)
        np.put_along_axis(wanted, np.argsort(-top, 1, kind="stable")[:, :5], True, 1)
        np.testing.assert_array_equal(plan.blocks[:, block], wanted)


def test_hip_at_a_narrow_beam_keeps_as_many_pages_as_it_was_told():
    q, k, _ = made(130, 3001)
    plan = select("hip", {"keep": 7, "beam": 8, "sink": 1, "recent": 0}, q, k)
    free = plan.blocks & ~forced(130, 3001)
    assert ((6 <= free.sum(2)) & (free.sum(2) <= 7)).all()


@pytest.mark.parametrize("method, options", [("hip", {"keep": 9, "beam": 8}), ("pbs_attn", {"segment": 40}), ("proxy_attn", {"stride": 5}),
                                             ("minference", {"n_v": -1}), ("sample_attention", {"rows": 0})])
def test_options_out_of_range_are_refused(method, options):
    with pytest.raises(ValueError, match="got"):
        load_policy("prefill", method, options)
