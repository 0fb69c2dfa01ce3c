"""What `edgeattn calibrate --parts prefill` fits, writes and refuses, and that methods go by it."""
import json
import shutil

import numpy as np
import pytest

from edgeattn import calibration
from edgeattn.cache.options import CacheOptions
from edgeattn.calibrate_prefill import DENSITY, fit_prefill
from edgeattn.page_sums import PageSums
from edgeattn.policies import load_policy
from edgeattn.policies.prefill.moa import band
from edgeattn.prefill_plan import LayerKeys, PrefillPlan, attend, causal, forced
from edgeattn.prefill_scheduler import PrefillOptions, PrefillScheduler
from edgeattn.recording import record_chunk
from edgeattn.runtime import Model, read_config
from edgeattn.scheduler import SparseOptions
from edgeattn.tokenizer import Tokenizer
from prefill_driver import structured
from tiny import save_tiny

RNG = np.random.default_rng()
NAMES = {"sale": "sale_thresholds", "minference": "minference_patterns", "sparge_attn": "sparge_attn", "moa": "moa_spans"}
OWN = {"sale": {"threshold": 0.1}, "minference": {"n_v": 50, "n_s": 100}, "sparge_attn": {"fraction": 0.2}, "moa": {"beta": 0.1}}
LENGTHS = 480, 800


@pytest.fixture(scope="module")
def folder(tmp_path_factory, nano_checkpoint):
    """A tiny exported model with nano's tokenizer."""
    from edgeattn.exporters.export import export
    made = tmp_path_factory.mktemp("prefill")
    save_tiny("llama", made / "checkpoint", vocab_size=8192, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nano_checkpoint / name, made / "checkpoint")
    export(made / "checkpoint", made / "model", precision="int8")
    return made / "model"


@pytest.fixture(scope="module")
def model(folder):
    return Model.load(folder, cache=CacheOptions("f16", "f16"), ubatch=256, threads=1, sparse=SparseOptions("off"),
                      prefill=PrefillOptions("off"))


@pytest.fixture(scope="module")
def prompts(folder):
    return [calibration.passkeys(Tokenizer(folder), n, 0, recent=64)[0] for n in LENGTHS]


@pytest.fixture(scope="module")
def fitted(model, prompts):
    return fit_prefill(model, prompts)


@pytest.fixture
def calibrated(folder, fitted, tmp_path):
    """A copy of the folder with what was fitted in it."""
    shutil.copytree(folder, tmp_path / "model")
    calibration.save(tmp_path / "model" / calibration.FILE, read_config(folder), fitted, {name: {} for name in fitted})
    return tmp_path / "model"


@pytest.mark.parametrize("n, m, heads, kv_heads", [(512, 1536, 4, 1), (200, 1003, 2, 2), (64, 64, 2, 1), (1, 70, 3, 1)])
def test_page_sums_give_the_outputs_of_plans(n, m, heads, kv_heads):
    q, k, v = structured(RNG, heads, kv_heads, m, 64)
    q = q[:, m - n:]
    sums, allowed = PageSums(q, k, v, 0.125), causal(n, m)
    plans = forced(n, m) | allowed & (RNG.random((3, heads, *allowed.shape)) < 0.3)
    plans[0] = True  # what nobody sees weighs nothing
    found = sums.outputs(plans)
    assert found.shape == (3, heads, n, 64) and found.dtype == np.float32
    for blocks, out in zip(plans, found):
        np.testing.assert_allclose(out, attend(q, k, v, PrefillPlan(blocks, None, n, m), 0.125)[0], atol=2e-4)
    np.testing.assert_allclose(sums.dense, found[0], atol=1e-5)
    np.testing.assert_allclose(sums.outputs(plans[1]), found[1], atol=1e-5)


def test_a_chunk_is_the_end_of_a_prompt_as_attention_reads_it(model, prompts):
    chunk = record_chunk(model, prompts[1])
    layers, kv_heads = model.cache.shape
    assert chunk.q.shape[2] == 256 and chunk.k.shape[:3] == (layers, kv_heads, 800) and chunk.k.dtype == np.float16
    assert record_chunk(model, prompts[0]).q.shape[2] == 240 and not model.cache.pools[0].used
    sequence = model.new_sequence()
    model.forward([(sequence, prompts[1])], "none")
    for layer, head in np.ndindex(layers, kv_heads):
        q, k, v = chunk.group(layer, head)
        for x, y in zip((k, v), model.cache.read(sequence, layer, head)):
            np.testing.assert_allclose(x[0], y, atol=2e-3)  # chunks were cut elsewhere
        np.testing.assert_array_equal(q, chunk.q[layer, head * len(q):][:len(q)])
    model.free(sequence)


def test_each_heads_calibration_is_that_of_its_methods(model, prompts, fitted):
    """All heads of a layer at once give the same, for what does not share one budget."""
    about = model.config["model"]
    shape = about["num_layers"], about["num_heads"]
    assert {name: x.shape for name, x in fitted.items()} == {"sale_thresholds": shape, "minference_patterns": (*shape, 3),
                                                             "sparge_attn": (*shape, 2), "moa_spans": (*shape, 2)}
    chunks = [record_chunk(model, ids) for ids in prompts]
    scale = model.attention_inputs(0)[1]["scale"]
    for layer in range(shape[0]):
        parts = [(x.q[layer], *(y[layer].astype(np.float32) for y in (x.k, x.v))) for x in chunks]
        for method, asset in (("sale", "sale_thresholds"), ("minference", "patterns"), ("sparge_attn", "sparge_attn")):
            whole = type(load_policy("prefill", method)).calibrate(*zip(*parts), scale)[asset]
            np.testing.assert_allclose(fitted[NAMES[method]][layer], whole, atol=2e-3)
    spans = fitted["moa_spans"].reshape(-1, 2)
    read = [PrefillPlan(band(*spans.T, x.q.shape[2], x.k.shape[2], 2, 2), None, x.q.shape[2], x.k.shape[2]).density() for x in chunks]
    assert np.mean(read) <= DENSITY + 1e-6 or (spans == spans.min(0)).all()


def test_progress_and_caches_that_round(model, prompts, folder):
    said = []
    fit_prefill(model, [ids[:200] for ids in prompts], lambda *x: said.append(x))
    total = 2 + model.cache.shape[0] * model.cache.shape[1]
    assert said == [(i + 1, total) for i in range(total)]
    rounded = Model.load(folder, cache=CacheOptions("int4", "int4"), sparse=SparseOptions("off"), prefill=PrefillOptions("off"))
    with pytest.raises(ValueError, match="f16 or f32"):
        fit_prefill(rounded, prompts)


# ---- the file --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", NAMES)
def test_policies_read_what_the_file_says(method, folder, calibrated, fitted):
    config, policy = read_config(folder), load_policy("prefill", method)
    assert policy.load(folder, config) is None
    assets, tensor = policy.load(calibrated, config), fitted[NAMES[method]]
    given = np.stack([assets["alpha"], assets["beta"]], -1) if method == "moa" else next(iter(assets.values()))
    np.testing.assert_array_equal(given, tensor)
    assert load_policy("prefill", method, OWN[method]).load(calibrated, config) is None  # what was asked for counts more
    other = {name: x for name, x in fitted.items() if name != NAMES[method]}
    calibration.save(calibrated / "other.safetensors", config, other, {})
    shutil.move(calibrated / "other.safetensors", calibrated / calibration.FILE)
    assert policy.load(calibrated, config) is None


@pytest.mark.parametrize("method", NAMES)
def test_another_models_or_a_damaged_calibration_is_refused(method, calibrated, fitted):
    config, policy, path = read_config(calibrated), load_policy("prefill", method), calibrated / calibration.FILE

    def refused(word, config=config):
        with pytest.raises(ValueError, match=word) as error:
            policy.load(calibrated, config)
        assert "\n" not in str(error.value) and "calibrate" in str(error.value)
    refused("another model", config | {"files": {}})
    for wrong in (fitted[NAMES[method]][:, 1:], np.full_like(fitted[NAMES[method]], np.nan, np.float32)):
        calibration.save(path, config, {NAMES[method]: wrong}, {})
        refused("finite numbers")
    if method == "minference":
        calibration.save(path, config, {NAMES[method]: np.full_like(fitted[NAMES[method]], 3)}, {})
        refused("none of three")
    path.write_bytes(path.read_bytes()[:60])
    refused("damaged")


@pytest.mark.parametrize("method, tight, loose", [("sale", 1e3, 0.0), ("minference", (0, 32, 32), (0, 10 ** 6, 0)),
                                                  ("sparge_attn", (-1, 0.1), (1, 1)), ("moa", (0, 0.1), (0, 1))])
def test_a_calibrated_model_reads_what_the_file_says(method, tight, loose, calibrated, fitted, prompts):
    """Of the first layer little, of the second everything."""
    config, values = read_config(calibrated), np.array(fitted[NAMES[method]])
    values[0], values[1] = tight, loose
    calibration.save(calibrated / calibration.FILE, config, {NAMES[method]: values}, {})
    model = Model.load(calibrated, cache=CacheOptions("f16", "f16"), ubatch=256, threads=1, sparse=SparseOptions("off"),
                       prefill=PrefillOptions(method, {}, 0))
    assert any("fitted to this model" in line for line in model.prefill.explain())
    model.forward([(model.new_sequence(), prompts[1][:768])], "none")
    (little, _), (everything, _) = model.prefill.shares()
    assert little < 0.6 and everything == pytest.approx(1)


@pytest.mark.parametrize("method", [*NAMES, "seer_attention"])
def test_heads_that_are_asked_alone_keep_what_was_fitted_to_them(method):
    """As they are where KV heads hold different tokens."""
    q, k, _ = structured(RNG, 6, 2, 1000, 64)
    scheduler, keys = PrefillScheduler(PrefillOptions(method), 2), LayerKeys(k)
    each = {"sale": {"sale_thresholds": RNG.uniform(0, 2, (2, 6))},
            "minference": {"patterns": RNG.integers((0, 32, 32), (3, 400, 400), (2, 6, 3))},
            "sparge_attn": {"sparge_attn": RNG.uniform((-1, 0.1), (0.1, 0.9), (2, 6, 2))},
            "moa": {"alpha": RNG.uniform(0, 300, (2, 6)), "beta": RNG.uniform(0, 0.5, (2, 6))}}
    scheduler.assets = each.get(method) or {name: np.repeat(x, 2, 0) if "gate" in name else x for name, x in
                                            scheduler.policy.example_assets(6, 2, 64).items()}
    if method == "seer_attention":
        scheduler.assets |= {name: RNG.standard_normal(scheduler.assets[name].shape, np.float32) / 8 for name in ("gate_q", "gate_k")}
        scheduler.policy = load_policy("prefill", method, {"fraction": 0.2})
    keys.alike = True
    (whole,) = scheduler._plans(1, q[:, -300:], keys, 0.125)
    keys.alike = False
    apart = np.concatenate([plan.blocks for plan in scheduler._plans(1, q[:, -300:], keys, 0.125)])
    np.testing.assert_array_equal(apart, whole.blocks)
    assert 0.05 < apart.mean() < 0.95 and (apart[:3] != apart[3:]).any()


def test_calibrate(edgeattn, folder):
    path = folder / calibration.FILE
    try:
        done = edgeattn("calibrate", "-m", folder, "--parts", "prefill", "--lengths", "480", "-s", "4", "-t", "1")
        assert done.returncode == 0 and done.stdout == f"prefill: 1 prompts of 480 tokens, seed 4. Written: {path}\n"
        tensors, metadata = calibration.load(folder, read_config(folder))
        assert set(tensors) == set(NAMES.values())
        assert json.loads(metadata["moa_spans"]) == {"lengths": [480], "prompts": 1, "seed": 4, "chunk": 512}
        edgeattn("calibrate", "-m", folder, "--parts", "components,prefill", "--lengths", "480", "--prompts", "2", "-s", "4", "-t", "1")
        again, metadata = calibration.load(folder, read_config(folder))
        assert json.loads(metadata["key_components"])["prompts"] == 2
        for name in NAMES.values():
            np.testing.assert_array_equal(tensors[name], again[name])
        done = edgeattn("generate", "-m", folder, "-p", "a", "-n", "1", "--sparse-prefill", "sale")
        assert done.returncode == 0
        path.write_bytes(b"nothing")
        assert "run edgeattn calibrate" in edgeattn.fails("generate", "-m", folder, "-p", "a", "-n", "1", "--sparse-prefill", "minference")
        assert "room for prompts of 896" in edgeattn.fails("calibrate", "-m", folder, "--lengths", "2048", "--parts", "prefill")
        assert "heads,components,thresholds,prefill" in edgeattn.fails("calibrate", "--parts", "prefil")
    finally:
        path.unlink(missing_ok=True)
