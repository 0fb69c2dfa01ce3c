"""DHSA's two ways to choose, against loops that say what they mean."""
import numpy as np
import pytest

from edgeattn.policies import load_policy
from edgeattn.policies.prefill import dhsa, dhsa_chunks
from edgeattn.prefill_plan import PAGE, QUERIES, causal, ends, forced, pool, softmax, spread
from prefill_driver import structured

RNG = np.random.default_rng()
SCALE = 0.125
SHAPES = [(512, 1536), (200, 1003), (64, 130), (130, 677), (1, 500)]  # (queries, keys)


def made(n, m, heads=2, kv_heads=1, depth=64):
    q, k, v = structured(RNG, heads, kv_heads, m, depth)
    return q[:, m - n:], k, v


def chosen(name, q, k, **options):
    return load_policy("prefill", name, options).select(q, k, SCALE)


# ---- DHSA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["topk", "a", "vs", "vsb"])
def test_dhsa_spends_its_whole_budget_on_pages_that_are_seen(mode):
    for n, m in SHAPES:
        q, k, _ = made(n, m)
        found = load_policy("prefill", "dhsa", {"mode": mode, "density": 0.2}).choose(q, k[0], SCALE, 0, 0, None)
        allowed = causal(n, m)
        assert not (found & ~allowed).any()
        assert (found.sum(2) == np.minimum(max(1, allowed.shape[1] // 5), allowed.sum(1))).all()
        if mode == "a" and allowed.shape[1] >= 10:
            assert found[..., 0].all() and (found & forced(n, m, 1, 0))[..., 1:].any(2).all()
        whole = chosen("dhsa", q, k, mode=mode, density=1.0)
        assert whole.density() == 1


@pytest.mark.parametrize("unit", [1, PAGE])
@pytest.mark.parametrize("n, m", SHAPES)
def test_vertical_slash_scores_are_the_chosen_weights_that_a_page_meets(n, m, unit):
    q, k, _ = made(n, m)
    asked, keys, budget = q[:, -64:], k[0], 40 if unit == 1 else 6
    places = np.arange(max(0, n - 64), n) + m - n
    if unit == PAGE:
        places = np.minimum(places[0] + np.arange(PAGE, len(places) + PAGE, PAGE), m) - 1 >> 5
        asked, keys = pool(asked, PAGE), pool(keys, PAGE)
    found, units = dhsa.vertical_slash(asked, keys, places, SCALE, budget, n, m), np.arange(len(keys))
    weights = softmax(np.where(units <= places[:, None], asked @ keys.T * SCALE, -np.inf))
    for head in range(2):
        across = np.zeros(len(keys))
        for row, place in enumerate(places):
            for key in range(place + 1):
                across[place - key] += weights[head, row, key]
        down = weights[head].sum(0)
        down, across = (np.where(np.isin(units, np.argsort(-x, kind="stable")[:budget // 2]), x, 0) for x in (down, across))
        for block, page in np.argwhere(causal(n, m)):
            first, last = m - n + block * QUERIES, ends(n, m)[block] - 1
            # a page that the text does not fill still has the distances of a full one
            distances = np.arange(max(first // unit - (page * PAGE + PAGE - 1) // unit, 0), last // unit - page * PAGE // unit + 1)
            inside = down[units * unit // PAGE == page].sum()
            assert found[head, block, page] == pytest.approx(inside + across[distances].sum(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("mode", ["vs", "vsb"])
def test_a_key_that_all_ask_for_is_read_by_all(mode):
    q, k, _ = made(300, 1503)
    topic = RNG.standard_normal(64).astype(np.float32)
    q, k[0, 610:620] = q + topic, 6 * topic
    assert chosen("dhsa", q, k, mode=mode, density=0.1).blocks[:, :, 19].all()


# ---- DHSA with chunks ------------------------------------------------------------------------------------------------
def test_boundaries_are_the_greedy_choice():
    for count in (0, 5, 10 ** 6):
        scores, kept = np.round(RNG.random(700), 2), []                              # many are equal
        for place in np.argsort(-scores, kind="stable"):
            if scores[place] > 0.3 and len(kept) < count and all(abs(place - other) > dhsa_chunks.APART for other in kept):
                kept.append(place)
        np.testing.assert_array_equal(dhsa_chunks.boundaries(scores, 0.3, count, 707), sorted([0, *(x + dhsa_chunks.SIDE for x in kept)]))


def test_chunks_begin_where_the_text_turns_and_the_best_are_read_whole():
    turns = np.sort(RNG.choice(np.arange(1, 40), 12, replace=False)) * 25
    topics = 16 * np.linalg.qr(RNG.standard_normal((64, 13)))[0].T.astype(np.float32)
    k = topics[np.searchsorted(turns, np.arange(1024), "right")][None] + 0.2 * RNG.standard_normal((1, 1024, 64), np.float32)
    q = np.repeat(topics[5][None, None], 64, 1) + 0.2 * RNG.standard_normal((3, 64, 64), np.float32)
    budget = PAGE * 5 + int(turns[5] - turns[4])
    mask = chosen("dhsa_chunks", q, k, chunk=75, budget=budget).mask()
    assert mask[:, -1, turns[4]:turns[5]].mean() > 0.95 and mask[0, -1].sum() == budget
    assert (mask == mask[0]).all()


@pytest.mark.parametrize("budget", [1, 300, 10 ** 4])
def test_the_budget_is_filled_key_by_key_in_the_order_of_the_scores(budget):
    n, m = 150, 611
    starts = np.union1d(RNG.choice(m, 40), [0])
    q, k = RNG.standard_normal((3, 8)).astype(np.float32), RNG.standard_normal((m, 8)).astype(np.float32)
    scores, always = dhsa_chunks.chunk_scores(q, k, starts), spread(forced(n, m), m)
    found = dhsa_chunks.fill(scores, starts, always, ends(n, m), budget)
    parts = np.split(k, starts[1:])
    np.testing.assert_allclose(scores, [[x @ part.mean(0) * len(part) ** 0.5 for part in parts] for x in q], rtol=1e-3, atol=1e-4)
    for block in range(3):
        kept = [key for key in range(ends(n, m)[block]) if always[block, key]]
        for chunk in np.argsort(-scores[block], kind="stable"):
            for key in range(starts[chunk], min(starts[chunk] + len(parts[chunk]), ends(n, m)[block])):
                if not always[block, key] and len(kept) < budget:
                    kept.append(key)
        np.testing.assert_array_equal(np.flatnonzero(found[block]), sorted(kept))
