"""Eviction policies: what all promise, found by file, and what each score means."""
from dataclasses import dataclass, fields, is_dataclass, replace

import numpy as np
import pytest

from edgeattn.policies import load_policy, policy_names
from edgeattn.policies.eviction.nats import GLOBAL, LOCAL, WINDOW

NAMES = policy_names("eviction")
BASES = [name for name in NAMES if name != "caote"]
SAME_FOR_ALL_HEADS = {"tova"}  # these mix heads, so permuting heads permutes nothing


def some_types(heads):
    return np.floor(np.abs(heads.keys()[..., 0]) * 4).astype(np.uint8) % 3  # any fixed function of the token


OPTIONS = {"nats": {"types": some_types, "window": 9}, "l2_norm": {"skip_layers": (0,)}}
CASES = [pytest.param(name, OPTIONS.get(name), id=name) for name in BASES] + [
    pytest.param("caote", {"base": base, "options": OPTIONS.get(base), "fast": fast}, id=f"{'fast-' * fast}caote-{base}")
    for base in BASES for fast in (False, True)]


@dataclass(frozen=True)
class View:
    layer: int
    positions: np.ndarray
    length: int
    mass: np.ndarray
    seen: np.ndarray
    k: np.ndarray
    v: np.ndarray

    handed: dict | None = None
    below: np.ndarray | None = None

    @property
    def carry(self):
        return {} if self.handed is None else self.handed

    def kept_below(self):
        return self.below

    def keys(self):
        return self.k.copy()

    def values(self):
        return self.v.copy()

    def arrays(self):
        return [value for value in vars(self).values() if isinstance(value, np.ndarray)]


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")  # pytest shows it when the test fails
    return np.random.default_rng(seed)


def random_view(rng, heads=None, slots=None, layer=None, head_dim=8):
    heads, slots = heads or int(rng.integers(1, 6)), slots or int(rng.integers(1, 90))
    length = slots + int(rng.integers(0, 50))
    cached = [np.append(np.sort(rng.permutation(length - 1)[:slots - 1]), length - 1) for _ in range(heads)]  # the newest is always there
    seen = rng.integers(0, 7, (heads, slots)).astype(np.float32)
    mass = rng.random((heads, slots), np.float32) * seen
    k, v = rng.standard_normal((2, heads, slots, head_dim), dtype=np.float32)
    return View(int(rng.integers(0, 4)) if layer is None else layer, np.array(cached, np.int32), length, mass, seen, k, v)


def scored(name, view, **options):
    return load_policy("eviction", name, options).scores(view)


@pytest.mark.parametrize("name, options", CASES)
def test_declares_what_it_needs(name, options):
    policy = load_policy("eviction", name, options)
    assert is_dataclass(policy) and type(policy).__dataclass_params__.frozen
    assert policy.mass in ("", "sum", "last") and isinstance(policy.probes, int)
    assert (policy.probes > 0) == (policy.mass != "") and not {"mass", "probes"} & {field.name for field in fields(policy)}


@pytest.mark.parametrize("name, options", CASES)
@pytest.mark.parametrize("shape", [{}, {"slots": 1}, {"heads": 1}, {"layer": 0}, {"slots": 400}], ids=str)
def test_scores_are_finite_float32_and_leave_the_view_alone(name, options, shape, rng):
    view = random_view(rng, **shape)
    before = [array.copy() for array in view.arrays()]
    policy = load_policy("eviction", name, options)
    scores = policy.scores(view)
    assert scores.shape == view.positions.shape and scores.dtype == np.float32 and scores.flags.writeable
    assert np.isfinite(scores).all()
    assert not any(np.shares_memory(scores, array) for array in view.arrays())
    np.testing.assert_array_equal(scores, policy.scores(view))
    np.testing.assert_array_equal(scores, load_policy("eviction", name, options).scores(view))
    for array, old in zip(view.arrays(), before, strict=True):
        np.testing.assert_array_equal(array, old)


@pytest.mark.parametrize("name, options", CASES)
def test_degenerate_caches_have_finite_scores(name, options, rng):
    view = random_view(rng)
    zero = np.zeros_like
    for odd in (replace(view, mass=zero(view.mass), seen=zero(view.seen)), replace(view, k=zero(view.k), v=zero(view.v))):
        assert np.isfinite(load_policy("eviction", name, options).scores(odd)).all()


@pytest.mark.parametrize("name, options", CASES)
def test_permuted_heads_have_permuted_scores(name, options, rng):
    view = random_view(rng, heads=5)
    order = rng.permutation(5)
    permuted = View(view.layer, view.positions[order], view.length, *(array[order] for array in view.arrays()[1:]))
    policy = load_policy("eviction", name, options)
    expected = policy.scores(view) if name in SAME_FOR_ALL_HEADS else policy.scores(view)[order]
    np.testing.assert_allclose(policy.scores(permuted), expected, rtol=1e-4, atol=1e-5)  # a mean over heads is summed in another order


@pytest.mark.parametrize("name, options", CASES)
def test_reads_attention_only_where_it_says_so(name, options, rng):
    view = random_view(rng, slots=50)
    nothing = np.full_like(view.mass, np.nan)
    policy = load_policy("eviction", name, options)
    blind = policy.scores(replace(view, mass=nothing, seen=nothing))
    assert np.array_equal(blind, policy.scores(view)) == (policy.mass == "")


def test_streaming_llm_keeps_the_newest(rng):
    view = random_view(rng)
    np.testing.assert_array_equal(scored("streaming_llm", view), view.positions)


def test_random_draws_once_per_token(rng):
    view = random_view(rng, slots=3000, heads=1, layer=2)
    scores = scored("random", view)
    later = replace(view, length=view.length + 701, positions=view.positions[:, ::3])  # a third is left, and 701 more have come
    np.testing.assert_array_equal(scored("random", later), scores[:, ::3])
    assert (scored("random", replace(view, layer=3)) != scores).mean() > 0.99
    assert (scored("random", view, seed=1) != scores).mean() > 0.99
    assert abs(scores.mean() - 0.5) < 0.03 and scores.min() >= 0 and scores.max() < 1


def test_h2o_keeps_the_token_with_all_the_mass(rng):
    view = random_view(rng, slots=50)
    heavy = rng.integers(0, 50, len(view.mass))
    mass = np.float32(view.seen.max()) * (np.arange(50) == heavy[:, None])
    np.testing.assert_array_equal(scored("h2o", replace(view, mass=mass.astype(np.float32))).argmax(axis=1), heavy)


def causal_attention(rng, length, probes, uniform=False):
    """(mass, seen) [1, length] of the last `probes` queries of a random causal attention matrix."""
    weights = np.tril(np.ones((length, length)) if uniform else rng.random((length, length)))[length - probes:]
    mass = (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
    seen = np.minimum(length - np.arange(length), probes)
    return mass[None].astype(np.float32), seen[None].astype(np.float32)


def test_zip_saliency_of_equal_attention_is_equal(rng):
    view = random_view(rng, heads=1, slots=60)
    equal = replace(view, mass=view.seen * np.float32(0.125))
    np.testing.assert_array_equal(scored("zip_saliency", equal), np.where(view.seen > 0, np.float32(0.125), 0))
    mass, seen = causal_attention(rng, 60, 20, uniform=True)
    spread = scored("zip_saliency", replace(view, mass=mass, seen=seen))
    assert spread.max() / spread.min() <= 60 / 41 + 1e-5        # its rows hold from 1/41 to 1/60 per token
    assert mass.max() / mass.min() > 20                         # where a plain sum prefers the old twentyfold


def test_zip_saliency_is_attention_per_probe(rng):
    mass, seen = causal_attention(rng, 40, 12)
    view = replace(random_view(rng, heads=1, slots=40), mass=mass, seen=seen)
    np.testing.assert_allclose(scored("zip_saliency", view)[0], [mass[0, i] / min(12, 40 - i) for i in range(40)], rtol=1e-6)


def test_tova_keeps_the_same_tokens_in_all_heads(rng):
    view = random_view(rng, heads=4)
    scores = scored("tova", view)
    assert (scores == scores[0]).all()
    np.testing.assert_allclose(scores[0], sum(view.mass[h] for h in range(4)) / 4, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_snapkv_averages_neighbours(kernel, rng):
    view = random_view(rng)
    heads, slots = view.mass.shape
    expected = np.zeros((heads, slots))
    for h in range(heads):
        for s in range(slots):
            for near in range(s - kernel // 2, s + kernel // 2 + 1):
                expected[h, s] += view.mass[h, near] / kernel if 0 <= near < slots else 0
    np.testing.assert_allclose(scored("snapkv", view, kernel=kernel), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [0, -1, 4])
def test_snapkv_refuses_a_kernel_without_a_middle(kernel):
    with pytest.raises(ValueError, match=f"odd.*{kernel}"):
        load_policy("eviction", "snapkv", {"kernel": kernel})


def test_l2_norm_keeps_low_norms_and_skips_layers(rng):
    view = random_view(rng, layer=3, slots=40)
    by_norm = np.argsort([[sum(float(x) ** 2 for x in key) for key in head] for head in view.k], axis=1)
    np.testing.assert_array_equal(np.argsort(-scored("l2_norm", view), axis=1), by_norm)
    np.testing.assert_array_equal(scored("l2_norm", view, skip_layers=(0, 3)), view.positions)


def test_key_diff_keeps_the_distinctive(rng):
    view = random_view(rng, heads=3, slots=30)
    others = view.k[:, 2:] / np.linalg.norm(view.k[:, 2:], axis=2, keepdims=True)
    mean = others.mean(axis=1, keepdims=True)
    k = np.concatenate([3 * mean, -7 * mean, view.k[:, 2:]], axis=1)  # the two cancel: the mean of normalised keys keeps its direction
    scores = scored("key_diff", replace(view, k=k))
    np.testing.assert_array_equal(scores.argmin(axis=1), 0)
    np.testing.assert_array_equal(scores.argmax(axis=1), 1)
    np.testing.assert_allclose(scores[:, :2], [[-1, 1]] * 3, atol=1e-5)
    scaled = k * rng.uniform(0.1, 9, (3, 30, 1)).astype(np.float32)
    np.testing.assert_allclose(scored("key_diff", replace(view, k=scaled)), scores, atol=1e-5)


def attention(logits, values):
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights, weights @ values


@pytest.mark.parametrize("base", ["h2o", "zip_saliency", "tova"])
def test_caote_is_the_error_of_a_real_removal(base, rng):
    view = random_view(rng, heads=1, slots=40, head_dim=16)
    values, logits = view.v[0].astype(np.float64), view.k[0].astype(np.float64) @ rng.standard_normal(16)
    logits /= np.abs(logits).max() / 4  # weights up to 3,000-fold apart, the largest well below 1
    weights, out = attention(logits, values)
    removed = [np.linalg.norm(attention(np.delete(logits, j), np.delete(values, j, axis=0))[1] - out) for j in range(40)]
    one_query = replace(view, mass=weights[None].astype(np.float32), seen=np.ones((1, 40), np.float32))
    scores = scored("caote", one_query, base=base)[0]
    np.testing.assert_allclose(scores, removed, atol=1e-5, rtol=1e-5)
    assert removed[scores.argmin()] <= min(removed) + 1e-5
    fast = weights / (1 - weights) * np.linalg.norm(values.mean(axis=0) - values, axis=1)
    np.testing.assert_allclose(scored("caote", one_query, base=base, fast=True)[0], fast, atol=1e-5, rtol=1e-5)


def test_caote_takes_negative_scores_as_logarithms(rng):
    view = random_view(rng, heads=1, slots=30, layer=5)
    weights, out = attention(-np.linalg.norm(view.k[0].astype(np.float64), axis=1), view.v[0].astype(np.float64))
    expected = weights / (1 - weights) * np.linalg.norm(out - view.v[0], axis=1)
    np.testing.assert_allclose(scored("caote", view, base="l2_norm")[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fast", [False, True])
def test_caote_never_gives_up_a_token_with_all_the_weight(fast, rng):
    view = random_view(rng, heads=2, slots=20)
    for share in (1, 1 - 1e-7):
        mass = np.full((2, 20), (1 - share) / 19, np.float32)
        mass[:, 7] = share
        np.testing.assert_array_equal(scored("caote", replace(view, mass=mass), base="h2o", fast=fast).argmax(axis=1), 7)


def test_caote_needs_what_its_base_needs():
    for base in BASES:
        inner, wrapped = (load_policy("eviction", *args) for args in (
            (base, OPTIONS.get(base)), ("caote", {"base": base, "options": OPTIONS.get(base)})))
        assert (wrapped.mass, wrapped.probes) == (inner.mass, inner.probes)
    with pytest.raises(ValueError, match="h2o"):
        load_policy("eviction", "caote", {"base": "oracle"})


def test_nats_live_set_is_that_of_tokens_arriving_one_by_one(rng):
    length, window = 120, 17
    types = rng.choice([GLOBAL, LOCAL, WINDOW], length, p=[0.05, 0.5, 0.45]).astype(np.uint8)
    view = random_view(rng, heads=1, slots=length)
    live = set()
    for t in range(length):
        live.add(t)
        if types[t] == GLOBAL:
            live -= {i for i in live if types[i] == LOCAL and i < t}
        live -= {i for i in live if types[i] == WINDOW and t - i >= window}
        positions = np.arange(t + 1, dtype=np.int32)[None]
        for cached in (positions, positions[:, np.isin(positions[0], list(live)) | (rng.random(t + 1) < 0.5)]):  # some freed before
            scores = scored("nats", replace(view, positions=cached, length=t + 1), types=lambda v: types[v.positions], window=window)
            assert set(scores[0]) <= {0, 1} and set(cached[scores == 1].tolist()) == live


def test_nats_needs_types():
    with pytest.raises(ValueError, match="types"):
        load_policy("eviction", "nats")


def test_spatten_adds_up_over_layers_and_prunes_what_the_layer_before_has_pruned(rng):
    carry, view = {}, random_view(rng, heads=2, slots=20)
    length = view.length
    first = scored("spatten", replace(view, handed=carry))
    total = np.zeros(length)
    for positions, mass in zip(view.positions, view.mass):
        total[positions] += mass
    np.testing.assert_allclose(first, total[view.positions], rtol=1e-5)
    kept = np.zeros(length, bool)
    kept[view.positions[0, ::2]] = True
    second = scored("spatten", replace(view, handed=carry, below=kept))
    np.testing.assert_allclose(second[kept[view.positions]], 2 * total[view.positions][kept[view.positions]], rtol=1e-5)
    assert (second[~kept[view.positions]] < -1e8).all()
