"""Values left out by calibrated thresholds: what is kept of the softmax, what the mean gives back, and the calibration itself."""
import shutil

import numpy as np
import pytest
from kv_driver import Driver, dequantise

from edgeattn import calibration
from edgeattn.cache.budget import SelectionPlan
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.calibrate_thresholds import fit_thresholds, load_thresholds, save_thresholds
from edgeattn.kernels_cpu import steps
from edgeattn.kernels_cpu.cached_attention import ARGS
from edgeattn.page_formats import PAGE
from edgeattn.recording import record_queries
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions

LAYERS, KV_HEADS, DEPTH, GROUP = 2, 2, 64, 3


class Theta(Driver):
    """Decode steps by thresholds alpha + beta ln n, the same for all heads; without `means` nothing is given back."""

    def __init__(self, kind="f16", alpha=-np.inf, beta=0.0, means=True, tokens=2048):
        plan = SelectionPlan(1, 4, value_sums=means)
        super().__init__(KVCache(LAYERS, KV_HEADS, DEPTH, tokens, CacheOptions(kind, kind), 256, selection=plan), GROUP)
        self.sequence = self.cache.new_sequence()
        self.curves = np.full((KV_HEADS * GROUP, 2), [alpha, beta], np.float32)
        self.chosen = np.array([self.sequence.selection.ctypes.data], np.int64)
        self.rows[:, 1 + ARGS.index("batch.selections")] = self.chosen.ctypes.data
        self.rows[:, 1 + ARGS.index("selection.thresholds")] = self.curves.ctypes.data

    def decode(self, parts, dense=False):
        """The output of one token, which does not stay."""
        self.chosen[0] = 0 if dense else self.sequence.selection.ctypes.data
        (out,) = self.forward([(self.sequence, parts)], check=False, settle=False)
        found = [dequantise(self.cache, self.sequence, layer, head) for layer in range(LAYERS) for head in range(KV_HEADS)]
        self.rotated_q = [self.rotated(q, self.sequence) for q in parts[0]]
        self.cache.truncate(self.sequence, self.sequence.length - 1)
        return out, found


@pytest.mark.parametrize("tokens", [1, 31, 200, 1500])
@pytest.mark.parametrize("kind", ["f16", "int4"])
def test_a_threshold_of_minus_infinity_is_dense_bit_for_bit(kind, tokens):
    driver = Theta(kind)
    driver.fill(driver.sequence, tokens, check=False)
    parts = driver.random(1)
    np.testing.assert_array_equal(driver.decode(parts)[0], driver.decode(parts, dense=True)[0])


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("alpha, beta", [(2.6, 0.0), (0.0, 0.47), (-2.0, 0.85), (99.0, 0.0)])
def test_kept_weights_are_the_dense_ones_and_the_rest_goes_to_the_mean(alpha, beta, means):
    """Eight pages, which one task reads in one piece: above all thresholds only each head's best page is left."""
    driver = Theta(alpha=alpha, beta=beta, means=means)
    driver.fill(driver.sequence, 250, check=False)
    out, held = driver.decode(driver.random(1))
    some = 0
    for i, (keys, values) in enumerate(held):
        layer, head = divmod(i, KV_HEADS)
        q = driver.rotated_q[layer][:, head * GROUP:(head + 1) * GROUP]
        weights, scores = driver.weights(q, keys)[0], q[0] @ keys.T * driver.scale
        best = np.pad(scores, ((0, 0), (0, -len(keys) % PAGE)), constant_values=-np.inf).reshape(GROUP, -1, PAGE).max(-1)
        kept = (best >= alpha + beta * np.log(len(keys))).any(0)
        kept[best.argmax(1)] = True
        some += int(not kept.all())
        left = weights * np.repeat(kept, PAGE)[:len(keys)]
        expected = left @ values + means * (1 - left.sum(-1, keepdims=True)) * values.mean(0)
        np.testing.assert_allclose(out[layer, 0, head * GROUP:(head + 1) * GROUP], expected, rtol=0, atol=3e-5)
    assert some


@pytest.mark.parametrize("kind", ["f16", "int4"])
@pytest.mark.parametrize("alpha", [0.5, 2.6, 99.0])
def test_weights_sum_to_one_with_the_mean_and_to_less_without(kind, alpha):
    for means in (True, False):
        driver = Theta(kind, alpha=alpha, means=means)
        parts = driver.random(1500)
        parts[2][:] = 1
        for start in range(0, 1500, 250):
            driver.forward([(driver.sequence, [x[:, start:start + 250] for x in parts])], check=False)
        q, k, v = driver.random(1)
        out, _ = driver.decode((q, k, np.ones_like(v)))
        if means:
            np.testing.assert_allclose(out, 1, atol=2e-3)
        else:
            assert (out < 1.002).all() and (out > 0).all() and (alpha < 1 or (out < 0.9).any())


def test_the_mean_follows_decoded_and_forgotten_tokens():
    driver = Theta(alpha=99.0)
    driver.fill(driver.sequence, 100, check=False)
    driver.decode(driver.random(1))
    for _ in range(40):
        driver.forward([(driver.sequence, driver.random(1))], check=False)
    driver.cache.truncate(driver.sequence, 120)
    driver.fill(driver.sequence, 20, check=False)
    driver.forward([(driver.sequence, driver.random(1))], check=False)
    for layer, head in np.ndindex(LAYERS, KV_HEADS):
        slots, tokens, *sums = driver.sequence.value_sums[layer, head]
        assert slots == tokens == 141
        np.testing.assert_allclose(sums, dequantise(driver.cache, driver.sequence, layer, head)[1].sum(0), atol=1e-3)


# ---- calibration ---------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder(nano_fp32, tmp_path_factory):
    made = tmp_path_factory.mktemp("calibrated") / "nano"
    shutil.copytree(nano_fp32, made)
    return made


@pytest.fixture(scope="module")
def model(folder):
    return Model.load(folder, cache=CacheOptions("f32", "f32"), ctx_size=1100, ubatch=128)


def text(model, n):
    from edgeattn.tokenizer import Tokenizer
    return np.array(calibration.passkeys(Tokenizer(model.folder), n, 1)[0])


@pytest.fixture(scope="module")
def fitted(model):
    found = fit_thresholds(model, [text(model, 1024), text(model, 600)], kept=0.25)
    save_thresholds(model, found, kept=0.25)
    return found


def test_fitted_thresholds_keep_the_part_they_were_fitted_for(model, fitted, folder):
    """On the text they come from, to which the tenth of a deviation adds a little."""
    from edgeattn.calibrate_thresholds import ROWS
    ids, sequence, kept = text(model, 1024), model.new_sequence(), []
    model.compute(sequence, ids[:-ROWS])
    for layer, q in enumerate(record_queries(model, sequence, ids[-ROWS:])):
        for h in range(8):
            keys, _ = model.cache.read(sequence, layer, h // 4)
            scores = keys[:1008] @ q[h].T / 8
            best = np.pad(scores, ((0, 16), (0, 0)), constant_values=-np.inf).reshape(32, PAGE, ROWS).max(1)
            kept.append((best >= fitted[layer, h, 0] + fitted[layer, h, 1] * np.log(1024)).mean())
    model.free(sequence)
    assert 0.15 < np.mean(kept) < 0.35


def test_queries_are_those_of_the_forward_call(model):
    """With the cache they give what the first layer's attention wrote."""
    ids, sequence, batch = text(model, 600)[:300], model.new_sequence(), model._batch
    model.compute(sequence, ids[:-4])
    queries = record_queries(model, sequence, ids[-4:])
    assert queries.shape == (8, 8, 4, 64)
    batch.clear()
    batch.add(sequence, ids[-4:], np.arange(0))
    last = [step.operator for step in model.plan.steps].index("cached_attention")
    rows = model.plan.items[0][:last + 1]
    steps.run(rows, batch.state)
    out, stride = (int(rows[last, 1 + ARGS.index(name)]) for name in ("out", "out.stride"))
    out = steps.f32_at(out, 4 * stride).reshape(4, stride)[:, :512].reshape(4, 8, 64)
    for h in range(8):
        keys, values = model.cache.read(sequence, 0, h // 4)
        scores = queries[0, h].astype(np.float64) @ keys.T / 8
        scores[np.arange(300) > 296 + np.arange(4)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        np.testing.assert_allclose(out[:, h], weights / weights.sum(-1, keepdims=True) @ values, atol=1e-4)
    model.free(sequence)


def test_a_model_runs_by_its_thresholds(model, fitted, folder):
    ids = text(model, 1000)

    def logits(**options):
        sparse = Model.load(folder, cache=CacheOptions("f32", "f32"), ctx_size=1100, ubatch=128,
                            sparse=SparseOptions("top_theta", options, 0))
        sequence = sparse.new_sequence()
        sparse.forward([(sequence, ids[:-1])], "none")
        return sparse.forward([(sequence, ids[-1:])])
    sequence = model.new_sequence()
    model.forward([(sequence, ids[:-1])], "none")
    expected = model.forward([(sequence, ids[-1:])])
    model.free(sequence)
    np.testing.assert_array_equal(logits(dense_layers=8), expected)
    with_means, without = (np.abs(logits(means=means) - expected).mean() for means in (True, False))
    assert 0 < with_means < without < np.abs(expected).mean()


@pytest.mark.parametrize("damage, message", [
    (None, "not calibrated"), ({"head_scores": np.zeros((8, 2), np.float32)}, "no thresholds"),
    ({"thresholds": np.zeros((8, 4, 2), np.float32)}, r"must be \[8, 8, 2\] float32"),
    ({"thresholds": np.full((8, 8, 2), np.nan, np.float32)}, "without NaN")])
def test_unusable_thresholds_are_refused(nano_fp32, model, tmp_path, damage, message):
    if damage:
        calibration.save(tmp_path / calibration.FILE, model.config, damage, {name: {} for name in damage})
    with pytest.raises(ValueError, match=message):
        load_thresholds(tmp_path, model.config)


def test_too_short_prompts_and_impossible_parts_are_refused(model):
    with pytest.raises(ValueError, match="256 tokens at least"):
        fit_thresholds(model, [np.arange(100)])
    with pytest.raises(ValueError, match="part of the pages"):
        fit_thresholds(model, [], kept=0.0)
