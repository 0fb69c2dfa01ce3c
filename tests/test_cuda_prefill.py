"""What kernels choose for prompts against the policies in NumPy, on keys as the pages hold them, and attention over what was chosen."""
import numpy as np
import pytest
from cuda_device import needs_cuda
from cuda_prompts import LAST, SHAPES, Prompts, pairs_of

from edgeattn.kernels_cuda.prefill_call import QUERIES
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy
from edgeattn.policies.prefill.dhsa import vertical_slash
from edgeattn.policies.prefill.minference import A_SHAPE, BLOCK_SPARSE, SLASHES, VERTICAL_SLASH, VERTICALS
from edgeattn.prefill_plan import PrefillPlan, best, by_distance, causal, ends, forced, pool, slash_pages, softmax, spread, true_weights

pytestmark = needs_cuda
RNG = np.random.default_rng()
METHODS = {"auto": ("auto", {"budget": 256, "least": 64, "fraction": 0.2, "recent": 3}, 0.01),
           "strides of 8": ("xattention", {"tau": 0.6}, 0.02), "strides of 16": ("xattention", {"tau": 0.5, "stride": 16}, 0.02),
           "strides of 32": ("xattention", {"tau": 0.4, "stride": 32, "recent": 1}, 0.02),
           "scan": ("sale", {"threshold": 0.05, "bits": 8}, 0.02),
           "ranks": ("dhsa", {"density": 0.3, "mode": "a", "recent": 0}, 0.01),
           "likeness": ("sparge_attn", {"fraction": 0.3}, 0.01),
           "spans": ("moa", {"alpha": 70, "beta": 0.25}, 1e-9)}  # policy, options, part of the pages that may differ


def nearly_same(chosen, expected, tolerance):
    """Pages; of few of them rounding may decide about two."""
    differ = chosen != expected
    assert differ.mean() < max(tolerance, 3 / differ.size), f"{100 * differ.mean():.2f} % of the pages differ"


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_lists_are_what_the_policy_chooses(method, shape, lengths, new, listed, types, whole):
    name, options, tolerance = METHODS[method]
    policy, scale = load_policy("prefill", name, options), shape[2] ** -0.5
    if name in ("xattention", "sale") and shape[2] not in (64, 128):
        with pytest.raises(ValueError, match="choose another"):
            Prompts(types, *shape, lengths, new, listed, whole).run(policy)
        return
    prompts = Prompts(types, *shape, lengths, new, listed, whole)
    found, out, (read, pairs) = prompts.run(policy)
    total = 0
    for s, n in enumerate(new):
        m = lengths[s] + n
        plan = PrefillPlan(np.ones((1, -(-n // QUERIES), -(-m // PAGE)), bool), None, n, m)
        if s in listed:
            expected = policy.select(prompts.q[s], list(prompts.keys(s)[0]), scale).union(shape[1]).blocks
            if whole:
                expected[:, -LAST:] = causal(n, m)[-LAST:]
            plan = found[s]
            assert plan.blocks.sum(2).min() > 0
            nearly_same(plan.blocks, expected, tolerance)
            total += pairs_of(plan)
        assert prompts.close(s, out, plan, scale) < 4e-3
    assert abs(read - total) < 0.5 and pairs == sum(shape[1] * (n * past + n * (n + 1) // 2) for s, (past, n) in
                                                   enumerate(zip(lengths, new)) if s in listed)


def test_everything_is_read_where_the_policy_says_so():
    prompts = Prompts("f16", 8, 2, 64, [700], [150], [0], False)
    found, _, (read, pairs) = prompts.run(load_policy("prefill", "auto", {"part": 1.0, "fraction": 1.0}))
    np.testing.assert_array_equal(found[0].blocks, np.broadcast_to(causal(150, 850), found[0].blocks.shape))
    assert read == pairs


LEAST = {"part": 1.0, "budget": 0, "least": 0, "recent": 0}  # of auto: as many as `fraction` says


@pytest.mark.parametrize("name, options, tokens", [("dhsa", {"density": 0.58, "recent": 0}, 1600), ("auto", LEAST | {"fraction": 0.6}, 800),
                                                   ("auto", LEAST | {"fraction": 0.56}, 800)])
def test_as_many_pages_as_python_s_floats_say(name, options, tokens):
    """Of 50 and 25 pages, where products of float32 are a page more or less."""
    prompts, policy = Prompts("f16", 1, 1, 64, [tokens - 64], [64], [0], False, even=True), load_policy("prefill", name, options)
    found = prompts.run(policy)[0][0].blocks[0, 0]
    expected = policy.select(prompts.q[0], list(prompts.keys(0)[0]), 0.125).blocks[0, 0]
    assert found.sum() == expected.sum() and (found != expected).sum() <= 2


def test_spans_are_each_head_s_own():
    policy, lengths, new = load_policy("prefill", "moa"), [640, 96], [64, 70]
    prompts = Prompts("f16", 8, 4, 64, lengths, new, [0, 1], False)
    assets = {"alpha": np.float32(RNG.integers(-100, 100, (1, 8))), "beta": np.float32(RNG.random((1, 8)) / 2)}
    for s, plan in prompts.run(policy, assets=assets)[0].items():
        expected = policy.select(prompts.q[s], list(prompts.keys(s)[0]), 0.125, 0, assets).union(4)
        np.testing.assert_array_equal(plan.blocks, expected.blocks)


def expected_lines(q, k, scale, patterns, rows):
    """Of a KV head's query heads: (what must be among the verticals, what may be; the same of slashes) [m] bool, up to weights that nearly
    equal the least that counts."""
    n, m, group = q.shape[1], len(k), len(q)
    sampled = np.arange(max(0, n - rows), n)
    weights, found = true_weights(q, k, sampled, scale), []
    by_slash = by_distance(weights, m - n + sampled)
    for sums, counts, first in ((weights.sum(1), patterns[:, 1], VERTICALS), (by_slash, patterns[:, 2], SLASHES)):
        must, may = np.zeros((2, m), bool)
        for head in range(group):
            if patterns[head, 0] == VERTICAL_SLASH and counts[head]:
                sums[head, :first] = np.inf
                least = np.sort(sums[head])[-min(m, counts[head])]
                must, may = must | (sums[head] > 1.05 * least), may | (sums[head] >= 0.95 * least)
            elif patterns[head, 0] == A_SHAPE:
                must[:counts[head]] = may[:counts[head]] = True
        found += [must, may]
    return found


LINES = {"lines": (64, [(VERTICAL_SLASH, 36, 103)]),  # last queries that are looked at; what heads may have
         "patterns": (21, [(VERTICAL_SLASH, 36, 104), (BLOCK_SPARSE, 70, 0), (A_SHAPE, 20, 50), (VERTICAL_SLASH, 0, 101)])}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES[:4])
@pytest.mark.parametrize("kind", LINES)
def test_lines_are_where_the_weight_is(kind, shape, lengths, new, listed, types, whole):
    """What is read follows from the lines to the page and key; which lines there are, from weights of which some may be nearly alike."""
    (heads, kv_heads, _), scale, (rows, some) = shape, shape[2] ** -0.5, LINES[kind]
    policy = load_policy("prefill", "minference", {"n_v": 36, "n_s": 103, "rows": rows})
    prompts, group = Prompts(types, *shape, lengths, new, listed, whole), heads // kv_heads
    patterns = np.int32(some)[RNG.integers(0, len(some), (1, heads))]
    assets = {"patterns": patterns} if len(some) > 1 else None
    found, out, (read, _) = prompts.run(policy, assets=assets)
    total, lines = 0, prompts.lines(policy)
    for s in listed:
        n, m, (k, _), (verticals, slashes) = new[s], lengths[s] + new[s], prompts.keys(s), lines[s]
        blocks = forced(n, m, policy.sink, policy.recent) | slash_pages(slashes, n, m) & causal(n, m)
        for head in range(kv_heads):
            own = slice(head * group, (head + 1) * group)
            lists = expected_lines(prompts.q[s][own], k[head], scale, patterns[0, own], rows)
            for got, must, may in zip((verticals[head], slashes[head]), lists[::2], lists[1::2]):
                assert not (must & ~got).any() and not (got & ~may).any()
            if (by_means := patterns[0, own][patterns[0, own, 0] == BLOCK_SPARSE]).size:
                scores = pool(prompts.q[s][own][patterns[0, own, 0] == BLOCK_SPARSE], QUERIES) @ pool(k[head], PAGE).T
                blocks[head] |= best(scores, causal(n, m), np.repeat(by_means[:, 1:2] // PAGE, scores.shape[1], 1)).any(0)
        if whole:
            blocks[:, -LAST:] = causal(n, m)[-LAST:]
        plan = found[s]
        assert (plan.blocks != blocks).mean() < (0.01 if assets else 1e-9)
        columns = verticals[:, None] & (np.arange(m) < ends(n, m)[:, None]) & ~spread(plan.blocks, m)
        np.testing.assert_array_equal(plan.columns if plan.columns is not None else columns & False, columns)
        total += pairs_of(plan)
        assert prompts.close(s, out, plan, scale) < 4e-3
    assert abs(read - total) < 0.5


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES[:4])
@pytest.mark.parametrize("mode", ["vs", "vsb"])
def test_pages_are_those_that_heavy_lines_cross(mode, shape, lengths, new, listed, types, whole):
    """Up to pages that differ from the least that counts by less than the least lines weigh, where kernels may have others of these: of
    keys, by products of halves; of pages, whose products are of floats, where the next line weighs the same but for rounding."""
    (_, kv_heads, _), scale, policy = shape, shape[2] ** -0.5, load_policy("prefill", "dhsa", {"mode": mode, "density": 0.25, "recent": 0})
    prompts = Prompts(types, *shape, lengths, new, listed, whole)
    found, out, (read, _) = prompts.run(policy)
    total = 0
    for s, plan in found.items():
        n, m = plan.queries, plan.keys
        allowed, rows = causal(n, m), np.arange(max(0, n - QUERIES), n)
        count = max(1, int(policy.density * allowed.shape[1]))
        must, may = (np.broadcast_to(forced(n, m, policy.sink, 0), plan.blocks.shape).copy() for _ in range(2))
        for h, (q, k) in enumerate(zip(prompts.q[s].reshape(kv_heads, -1, *prompts.q[s].shape[1:]), prompts.keys(s)[0])):
            asked, units, places, budget = q[:, rows], k, rows + m - n, count * PAGE
            if mode == "vsb":
                asked, units, budget = pool(asked, PAGE), pool(k, PAGE), count
                places = np.minimum(places[0] + PAGE * np.arange(1, asked.shape[1] + 1), m) - 1 >> 5
            weights = softmax(np.where(np.arange(len(units)) <= places[:, None], asked @ units.T * scale, -np.inf))
            chosen, unsure = min(len(units) - 1, -(-budget // 2)), 0
            for lines in (np.sort(x, 1) for x in (weights.sum(1), by_distance(weights, places))):
                least, next_one = lines[:, -chosen], lines[:, -chosen - 1]
                unsure = unsure + np.where((mode == "vs") | (next_one > 0.9999 * least), least, 0)
            scores = np.where(allowed, vertical_slash(asked, units, places, scale, budget, n, m), -1)
            limit, near = np.sort(scores, 2)[..., -count, None], 2 * unsure[:, None, None]
            must[h] |= (allowed & (scores > 1.01 * limit + near)).any(0)
            may[h] |= (allowed & (scores >= 0.99 * limit - near)).any(0)
        if whole:
            must[:, -LAST:] = may[:, -LAST:] = causal(n, m)[-LAST:]
        print(f"must {must.mean():.3f}, {plan.blocks.mean():.3f}, may {may.mean():.3f}")
        assert not (must & ~plan.blocks).any() and not (plan.blocks & ~may).any()
        assert prompts.close(s, out, plan, scale) < 4e-3
        total += pairs_of(plan)
    assert abs(read - total) < 0.5


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES[:4])
def test_lists_are_of_keys_near_an_anchor(shape, lengths, new, listed, types, whole):
    """But for those so near the limit that halves decide."""
    prompts, scale, far, total = Prompts(types, *shape, lengths, new, listed, whole), shape[2] ** -0.5, 0.05, 0
    theta, step, sink, recent = RNG.uniform(3, 8), int(RNG.integers(1, 4)), int(RNG.integers(1, 6)), int(RNG.integers(0, 3))
    strict, policy, loose = (load_policy("prefill", "anchor", {"theta": theta + x, "step": step, "sink": sink, "recent": recent})
                             for x in (-far, 0, far))
    found, out, (read, _) = prompts.run(policy)
    for s, plan in found.items():
        must, may = (x.select(prompts.q[s], list(prompts.keys(s)[0]), scale).union(shape[1]) for x in (strict, loose))
        if whole:
            must.blocks[:, -LAST:], must.columns[:, -LAST:], may.columns[:, -LAST:] = causal(plan.queries, plan.keys)[-LAST:], False, False
        print(f"{theta=:.1f} {step=}: must {must.columns.mean():.3f}, {plan.columns.mean():.3f}, may {may.columns.mean():.3f}")
        np.testing.assert_array_equal(plan.blocks, must.blocks)
        assert not (must.columns & ~plan.columns).any() and not (plan.columns & ~may.columns).any()
        assert prompts.close(s, out, plan, scale) < 4e-3
        total += pairs_of(plan)
    assert abs(read - total) < 0.5


@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES)
def test_lists_are_found_by_halving(shape, lengths, new, listed, types):
    """The policy's own, of queries that are rounded to halves."""
    prompts, scale, keep = Prompts(types, *shape, lengths, new, listed, False), shape[2] ** -0.5, int(RNG.integers(1, 3))
    options = {"keep": keep, "beam": keep + int(RNG.integers(6)), "stride": int(RNG.choice([1, 4, 5, 100])), "sink": 1}
    policy = load_policy("prefill", "hip", options | {"step": int(RNG.choice([1, 8, 11, 32])), "recent": int(RNG.integers(3))})
    found, out, (read, _) = prompts.run(policy)
    for s, plan in found.items():
        rounded = prompts.q[s].astype(np.float16).astype(np.float32)
        expected = policy.select(rounded, list(prompts.keys(s)[0]), scale).union(shape[1]).blocks
        nearly_same(plan.blocks, expected, 0.01)
        assert prompts.close(s, out, plan, scale) < 4e-3
    assert abs(read - sum(map(pairs_of, found.values()))) < 0.5


LITTLE = {"budget": 128, "least": 0, "fraction": 0.1, "recent": 0}  # for auto to read


@pytest.mark.parametrize("types", ["f16", "int4"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES[:4])
@pytest.mark.parametrize("name, options", [("auto", LITTLE), ("minference", {"n_v": 40, "n_s": 102, "recent": 0})])
def test_delta_adds_what_the_first_query_of_a_block_lacked(name, options, shape, lengths, new, listed, types):
    policy, scale = load_policy("prefill", name, options), shape[2] ** -0.5
    prompts = Prompts(types, *shape, lengths, new, listed, False, even=True)
    found, out, _ = prompts.run(policy, "delta")
    for s, n in enumerate(new):
        m = lengths[s] + n
        whole = PrefillPlan(np.ones((1, *causal(n, m).shape), bool), None, n, m)
        assert prompts.close(s, out, found.get(s, whole), scale, "delta" if s in listed else "none") < 6e-3
        assert s not in listed or found[s].density() > 0.7 or prompts.close(s, out, found[s], scale) > 0.1


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int3"])
@pytest.mark.parametrize("shape, lengths, new, listed", [*SHAPES[:4], ((4, 1, 64), [1200, 60, 1100], [40, 1, 33], [0, 2])])
@pytest.mark.parametrize("name, options", [("auto", LITTLE), ("minference", {"n_v": 40, "n_s": 102, "recent": 0})])
def test_tail_counts_what_is_left_out_as_its_mean(name, options, shape, lengths, new, listed, types, whole):
    """Of pages, but for those of which single keys are read."""
    policy, scale = load_policy("prefill", name, options), shape[2] ** -0.5
    prompts = Prompts(types, *shape, lengths, new, listed, whole, even=True)
    found, out, _ = prompts.run(policy, "tail")
    for s, n in enumerate(new):
        every = PrefillPlan(np.ones((1, *causal(n, lengths[s] + n).shape), bool), None, n, lengths[s] + n)
        plan, correction = (found[s], "tail") if s in listed else (every, "none")
        full = plan.keys // PAGE
        left = causal(n, plan.keys)[:, :full] & ~plan.blocks[..., :full]
        if plan.columns is not None:
            left &= ~plan.columns[..., :full * PAGE].reshape(*left.shape, PAGE).any(3)
        plain, error = (prompts.close(s, out, plan, scale, correction=way) for way in ("none", correction))
        print(f"{error:.4f}, without {plain:.4f}; {left.mean():.2f} of the pages are means")
        assert error < 2e-3 and (left.mean() < 0.1 or plain > 0.05)


@pytest.mark.parametrize("correction", ["tail", "delta"])
def test_heads_that_are_not_corrected(correction):
    with pytest.raises(ValueError, match="of heads of 64 or 128"):
        Prompts("f16", 8, 2, 80, [300], [70], [0], False).run(load_policy("prefill", "auto"), correction)
