"""Intervals against scipy, closed forms and simulation."""
import numpy as np
import pytest
from scipy import stats

from edgeattn.evaluation import statistics
from edgeattn.evaluation.outcome import Outcome


@pytest.mark.parametrize("right, count", [(0, 12), (1, 12), (39, 40), (40, 40), (150, 200)])
def test_wilson_is_scipys(right, count):
    expected = stats.binomtest(right, count).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(statistics.wilson(right / count, count), expected, atol=1e-6)


@pytest.mark.parametrize("freedom", [*range(1, 12), 15, 30, 200, 10_000])
def test_student_is_scipys(freedom):
    np.testing.assert_allclose(statistics.student(freedom), stats.t.ppf(0.975, freedom), rtol=2e-4)


def test_paired_interval_is_the_papers():
    np.testing.assert_allclose(statistics.paired_interval(36, 12, 2, 0), (0.0569, 0.3404), atol=1e-4)


@pytest.mark.parametrize("cells", [(36, 12, 2, 0), (0, 53, 1, 0), (53, 1, 0, 0), (10, 0, 0, 0), (0, 0, 0, 10), (5, 5, 5, 5)])
def test_paired_interval_holds_its_difference(cells):
    low, high = statistics.paired_interval(*cells)
    assert -1 <= low <= (cells[1] - cells[2]) / sum(cells) <= high <= 1 and low < high


def test_paired_interval_mirrors():
    low, high = statistics.paired_interval(20, 7, 3, 10)
    np.testing.assert_allclose(statistics.paired_interval(20, 3, 7, 10), (-high, -low))


@pytest.mark.parametrize("texts", [[8] * 20, [8] * 12 + [32], [32] * 4, [5] * 8], ids=["even", "recall", "few", "needle"])
def test_intervals_cover_what_is_true(texts):
    """Texts differ, so that the answers of one are not independent (their correlation is 0.1). Of intervals over pieces of texts, eight
    answers each, 76 in 100 hold what is true of four texts."""
    rng, held = np.random.default_rng(0), np.zeros(2)
    for _ in range(1000):
        rates = rng.beta(7.2, 1.8, len(texts))
        right = [(rng.random(size) < rate).astype(int) for size, rate in zip(texts, rates)]
        _, low, high = statistics.share(right)
        _, below, above = statistics.difference(right, [1 - row for row in right])
        held += low <= 0.8 <= high, below <= 0.6 <= above
    assert (held > 0.9 * 1000).all(), held


def test_clusters_widen_an_interval():
    alike, mixed = np.repeat([[0], [1]], 8, 1), np.tile([[0, 1]], (2, 4))
    widths = [high - low for _, low, high in map(statistics.share, (alike, mixed))]
    assert widths[0] > 1.7 * widths[1] and statistics.share(alike)[1:] == statistics.wilson(0.5, 2)  # as two answers, no fewer


def test_mean_of_equal_clusters_is_students():
    values = np.random.default_rng(1).normal(3, 1, (7, 5))
    means = values.mean(1)
    expected = stats.t.interval(0.95, 6, means.mean(), stats.sem(means))
    np.testing.assert_allclose(statistics.mean(values)[1:], expected, rtol=1e-4)


def test_mean_of_clusters_of_other_sizes_is_that_of_all_values():
    found, low, high = statistics.mean([[1, 1, 1], [5]])
    assert found == 2 and low < 2 < high


def test_one_cluster_has_no_interval():
    assert statistics.mean([[1.0, 2.0]]) == (1.5, None, None) and statistics.share([[1, 0]]) == (0.5, None, None)
    assert statistics.difference([[1, 1]], [[1, 0]]) == (0.5, None, None)


def test_perplexity_is_compared_as_a_ratio():
    base, other = Outcome("perplexity", [[1.0], [2.0], [4.0]]), Outcome("perplexity", [[1.1], [2.1], [4.1]])
    assert base.score()[0] == pytest.approx(np.exp(7 / 3))
    change, low, high = other.against(base)
    np.testing.assert_allclose((change, low, high), np.expm1(0.1))  # every window by as much: no doubt is left


def test_records_keep_outcomes():
    outcome = Outcome("share", [[1, 0], [1, 1]], {"x": 0.5}, 10, 20)
    record = outcome.record()
    assert Outcome.of(record) == outcome and record["score"] == 0.75 and record["low"] < 0.75 < record["high"] and record["samples"] == 4
