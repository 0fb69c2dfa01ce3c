"""Exports equal transformers: in stock onnxruntime and in our own runtime, every family, head size and precision."""
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
import torch
import transformers

from edgeattn.exporters import check, export as export_module
from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.export import export
from edgeattn.exporters.families import families, read_architecture
from edgeattn.exporters.interpret import interpret
from edgeattn.runtime import Model, read_config

TOKENS = np.random.default_rng(3).integers(0, tiny.SIZES["vocab_size"], 48)  # longer than any window and original rope length
LONG = np.concatenate([TOKENS, TOKENS[::-1]])                    # longer than two pages of the cache and two chunks of `ours` too
LIMITS = {"fp32": 1e-3, "fp16": 3e-2, "int8": 0.6, "int4": 4}    # largest error, in standard deviations of the logits


@pytest.fixture(autouse=True)
def quick_check(monkeypatch):
    """Exports of this file are compared here: their own check need not compile kernels."""
    monkeypatch.setattr(check, "_runtime_logits", check._onnxruntime_logits)


def run(folder, tokens, past=None, start=0):
    """(logits of every token, presents by name) of an export in stock onnxruntime."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {"token_ids": tokens, "positions": np.arange(start, start + len(tokens)), "logit_rows": np.arange(len(tokens))}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = past[value.name] if past else np.zeros((value.shape[0], 0, value.shape[2]), np.float32)
    names = [value.name for value in session.get_outputs()]
    logits, *presents = session.run(names, feeds)
    return logits, {name.replace("present", "past"): value for name, value in zip(names[1:], presents)}


def error(got, expected):
    return np.abs(got - expected).max() / expected.std()


def exported(tmp_path, case, precision="fp32", group_size=16, **sizes):
    """(model, folder) of a tiny case."""
    model = tiny.save_tiny(case, tmp_path / "checkpoint", **sizes)
    export(tmp_path / "checkpoint", tmp_path / "out", precision, group_size)
    return model, tmp_path / "out"


SHAPES = [dict(head_dim=d, num_attention_heads=h, num_key_value_heads=kv, hidden_size=16 * h)
          for d, h, kv in ((64, 4, 4), (80, 4, 2), (96, 3, 1), (128, 7, 1), (16, 6, 3), (16, 7, 7))]


def ours(folder, tokens, decoded):
    """Logits of every token in our runtime, the last `decoded` of them computed one at a time."""
    model = Model.load(folder, ctx_size=len(tokens), ubatch=40)  # less than the prompt: windows reach into an earlier chunk
    assert model.cache.options.name == "f32"
    sequence, first = model.new_sequence(), len(tokens) - decoded
    parts = [tokens[:first], *(tokens[i:i + 1] for i in range(first, len(tokens)))]
    return np.concatenate([model.forward([(sequence, part)], "all") for part in parts])


@pytest.mark.parametrize("case, shape", [*((case, {}) for case in tiny.FAMILIES), *(("llama", shape) for shape in SHAPES)], ids=str)
def test_our_runtime_equals_transformers(tmp_path, case, shape):
    model, folder = exported(tmp_path, case, **shape)
    expected = tiny.torch_logits(model, LONG)
    assert error(ours(folder, LONG, 0), expected) < LIMITS["fp32"]
    assert error(ours(folder, LONG, 5), expected) < LIMITS["fp32"]


@pytest.mark.parametrize("precision", LIMITS)
@pytest.mark.parametrize("case", tiny.FAMILIES)
def test_family_equals_transformers(tmp_path, case, precision):
    model, folder = exported(tmp_path, case, precision)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    logits, _ = run(folder, TOKENS)
    assert error(logits, tiny.torch_logits(model, TOKENS)) < LIMITS[precision]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_shapes(tmp_path, shape, precision):
    model, folder = exported(tmp_path, "llama", precision, **shape)
    assert error(run(folder, TOKENS)[0], tiny.torch_logits(model, TOKENS)) < LIMITS[precision]


OMISSIONS = {  # what the config of an exporter that forgets the feature would say
    "bias": ("llama_bias", dict(attention_bias=False)),
    "mlp bias": ("llama_bias", dict(mlp_bias=False)),
    "window": ("mistral", dict(sliding_window=None)),
    "window of some layers": ("qwen2_window", dict(use_sliding_window=False)),
    "llama3 rope": ("llama3_rope", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "linear rope": ("llama_linear_rope", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
    "theta": ("llama", dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
    "qkv bias": ("qwen2", dict(model_type="llama")),
    "QK norm": ("qwen3", dict(model_type="llama")),
}


@pytest.mark.parametrize("feature", OMISSIONS)
def test_omitted_feature_is_noticed(tmp_path, feature):
    case, changes = OMISSIONS[feature]
    model = tiny.save_tiny(case, tmp_path / "checkpoint")
    edit_config(tmp_path / "checkpoint", **changes, layer_types=None)
    source = Checkpoint(tmp_path / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:  # the check would refuse it, which is the next test
        patch.setattr(export_module, "check", lambda *_: {})
        export(tmp_path / "checkpoint", tmp_path / "out", "fp32")
    for engine, tokens in ((lambda *given: run(*given)[0], TOKENS), (lambda *given: ours(*given, 5), LONG)):
        assert error(engine(tmp_path / "out", tokens), tiny.torch_logits(model, tokens)) > 10 * LIMITS["fp32"]
    assert read_architecture(source).num_layers == 2


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_transformers_4_config_means_the_same(tmp_path):
    tiny.save_tiny("llama3_rope", tmp_path)
    new = read_architecture(Checkpoint(tmp_path))
    rope = dict(tiny.LLAMA3_ROPE)
    edit_config(tmp_path, rope_parameters=None, rope_theta=rope.pop("rope_theta"), rope_scaling=rope)
    np.testing.assert_array_equal(read_architecture(Checkpoint(tmp_path)).frequencies, new.frequencies)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_two_calls_equal_one(tmp_path, precision):
    _, folder = exported(tmp_path, "qwen2_window", precision)
    whole, presents = run(folder, TOKENS)
    first, past = run(folder, TOKENS[:29])
    second, both = run(folder, TOKENS[29:], past, start=29)
    tolerance = 1e-4 if precision == "fp32" else 0.05
    assert error(np.concatenate([first, second]), whole) < tolerance
    for name, value in presents.items():
        assert error(both[name], value) < tolerance


def test_shards_and_16_bit_weights(tmp_path):
    tiny.tiny_model("qwen3").to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint", max_shard_size="40KB")
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    export(tmp_path / "checkpoint", tmp_path / "out", "fp32")
    assert error(run(tmp_path / "out", TOKENS)[0], tiny.torch_logits(model, TOKENS)) < 1e-3


def test_one_initializer_for_a_tied_embedding(tmp_path):
    for case, tied in (("llama", False), ("llama_bias", True)):
        _, folder = exported(tmp_path / case, case, "int4")
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        names = {tensor.name for tensor in graph.initializer}
        assert ("lm_head.weight" in names) != tied
        table, head = graph.node[0].input[1], graph.node[-1].input[1]
        assert (table == head) == tied


def test_data_file_is_aligned_and_report_complete(tmp_path):
    _, folder = exported(tmp_path, "llama_bias", "int4")
    for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        size = int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        assert where or size <= 1024
        assert int(where.get("offset", 0)) % 64 == 0
    report = read_config(folder)
    assert set(report["files"]) == {path.name for path in folder.iterdir()} - {"edgeattn.json"}
    assert set(report["weights"].values()) == {"int4/16", "int8/16"}
    assert report["model"]["eos_token_ids"] == [2] and report["verify"]["rms_error"] < 0.6


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_interpreter_equals_onnxruntime(tmp_path, precision):
    _, folder = exported(tmp_path, "qwen3", precision)
    feeds = check._feeds(read_config(folder)["model"], TOKENS)
    assert error(interpret(folder, feeds, ["logits"])["logits"], run(folder, TOKENS)[0]) < (1e-3 if precision == "fp32" else 0.2)


@pytest.mark.parametrize("case", tiny.FAMILIES)
def test_numpy_forward_equals_transformers(tmp_path, case):
    model = tiny.save_tiny(case, tmp_path)
    source = Checkpoint(tmp_path)
    *_, (_, logits) = check.forward(source, read_architecture(source), TOKENS)
    assert error(logits, tiny.torch_logits(model, TOKENS)) < 1e-3


def test_families():
    assert families() == ["bitnet", "llama", "mistral", "qwen2", "qwen3"]
