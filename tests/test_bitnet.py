"""Ternary checkpoints: every stored form, against transformers' own layers and against the others."""
import json

import numpy as np
import onnx
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BitNetQuantConfig
from transformers.integrations.bitnet import WeightQuant, pack_weights, replace_with_bitnet_linear, unpack_weights

from edgeattn.apps.export import summary
from edgeattn.apps.weights import Weights
from edgeattn.exporters import check, export as export_module
from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.export import export
from edgeattn.exporters.families import read_architecture
from edgeattn.exporters.interpret import interpret
from edgeattn.exporters.weights import TERNARY_LAYOUTS
from edgeattn.runtime import Model, read_config

TOKENS = np.random.default_rng(4).integers(0, tiny.SIZES["vocab_size"], 40)
FORMS = {"masters": dict(linear_class="autobitlinear", quantization_mode="online"),
         "multiplied": dict(linear_class="autobitlinear", quantization_mode="offline"),
         "divided": dict(linear_class="bitlinear", quantization_mode="offline")}
FAMILIES = {"bitnet": dict(hidden_size=128, head_dim=32, intermediate_size=160, attention_bias=False), "llama": dict(intermediate_size=96)}


@pytest.fixture(autouse=True)
def eager():
    """transformers compiles its ternary layers; uncompiled they say the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def absmean(weight):
    """codes [N, K] float32 and the scale of a master."""
    scale = weight.float().abs().mean().clamp(min=1e-5)
    return (weight.float() / scale).round().clamp(-1, 1), scale


def save(folder, form, family="bitnet", seed=0, **about):
    """A tiny checkpoint in one of FORMS, bfloat16; the forms of a seed mean the same model."""
    tiny.tiny_model(family, seed, **FAMILIES[family]).bfloat16().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("_proj.weight")] if form != "masters" else ():
        codes, scale = absmean(state[name])
        scale = scale.bfloat16()
        state[name] = pack_weights(codes)
        state[f"{name}_scale"] = (1 / scale.float() if form == "divided" else scale).view(1)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    edit(folder, quantization_config={"quant_method": "bitnet", **FORMS[form], **about})
    return folder


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def transformers_logits(folder, form, family, tokens):
    """What transformers' layers make of a checkpoint, in float32."""
    state = load_file(folder / "model.safetensors")
    state = {name: value if value.dtype == torch.uint8 else value.float() for name, value in state.items()}
    model = tiny.tiny_model(family, **FAMILIES[family])
    replace_with_bitnet_linear(model, ["lm_head"], BitNetQuantConfig(**FORMS[form]))
    if form == "multiplied":  # as its loader does
        state = {name: unpack_weights(value, torch.float32) if value.dtype == torch.uint8 else value for name, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return tiny.torch_logits(model, tokens)


def exported(folder, out, precision="fp32", **options):
    """(folder, logits in NumPy): by default embedding and head are floats, so that nothing but the ternary layers rounds."""
    export(folder, out, precision, 16, **options)
    return out, interpret(out, check._feeds(read_config(out)["model"], TOKENS), ["logits"])["logits"]


def errors(got, expected):
    """Of every token, the largest, in standard deviations of the logits."""
    return np.abs(got - expected).max(1) / expected.std()


def agree(got, expected):
    """A float that lies on the edge between two integers may be rounded to either: that token is off by more than the rest."""
    error = errors(got, expected)
    assert np.median(error) < 1e-4 and error.max() < 0.2, error


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_transformers(tmp_path, form, family):
    folder = save(tmp_path / "checkpoint", form, family)
    if form == "masters":  # transformers rounds a master's scale to the type of its layers, which here is not the checkpoint's
        rewrite(folder, lambda state: {name: value.float() for name, value in state.items()})
    expected = transformers_logits(folder, form, family, TOKENS)
    source = Checkpoint(folder)
    *_, (_, logits) = check.forward(source, read_architecture(source), TOKENS)
    agree(logits, expected)
    out, logits = exported(folder, tmp_path / "out")
    agree(logits, expected)
    model = Model.load(out, ctx_size=len(TOKENS), ubatch=16)
    sequence = model.new_sequence()
    agree(np.concatenate([model.forward([(sequence, part)], "all") for part in np.split(TOKENS, [30, 31, 32])]), expected)
    assert errors(check._onnxruntime_logits(out, TOKENS), expected).max() < 0.3  # it rounds the integers once more, per block


@pytest.mark.parametrize("family", FAMILIES)
def test_forms_export_alike(tmp_path, family):
    outs = {form: exported(save(tmp_path / form, form, family), tmp_path / f"{form}.out")[0] for form in FORMS}
    data = {form: (out / "model.onnx.data").read_bytes() for form, out in outs.items()}
    assert data["masters"] == data["multiplied"]
    codes = {form: np.frombuffer(bytes_, np.uint8) for form, bytes_ in data.items()}
    assert (codes["divided"] != codes["masters"]).mean() < 0.02  # scales whose reciprocal's reciprocal is their neighbour


def interleaved(state):
    """Four neighbouring rows a byte."""
    def packed(weight):
        rows = torch.cat([weight >> 2 * i & 3 for i in range(4)])
        a, b, c, d = rows.view(-1, 4, rows.shape[1]).unbind(1)
        return a | b << 2 | c << 4 | d << 6
    return {name: packed(value) if value.dtype == torch.uint8 else value for name, value in state.items()}


FAULTS = {
    "rows of a byte": lambda folder: rewrite(folder, interleaved),
    "multiplied or divided": lambda folder: edit(folder, quantization_config={"quant_method": "bitnet", **FORMS["divided"]}),
    "sub-norms": lambda folder: edit(folder, model_type="llama", hidden_act="silu"),
    "int4 activations": lambda folder: edit(folder, quantization_config={"quant_method": "bitnet", **FORMS["multiplied"],
                                                                         "activation_bits": 4}),
}


def rewrite(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_noticed(tmp_path, fault, monkeypatch):
    folder = save(tmp_path / "checkpoint", "multiplied")
    expected = transformers_logits(folder, "multiplied", "bitnet", TOKENS)
    FAULTS[fault](folder)
    monkeypatch.setattr(export_module, "check", lambda *_: {})  # it would be as wrong
    _, logits = exported(folder, tmp_path / "out")
    assert np.median(errors(logits, expected)) > 0.05


def a48_logits(folder, tokens):
    """Masters with the activations of BitNet a4.8 (arXiv 2411.04965, equations 4 to 6): int4 by the mean magnitude, top half before o."""
    model = tiny.tiny_model("bitnet", **FAMILIES["bitnet"])
    replace_with_bitnet_linear(model, ["lm_head"], BitNetQuantConfig(**FORMS["masters"]))
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()}, assign=True)

    def int4(layer, inputs):
        x, = inputs
        scale = 7 ** 0.5 / x.abs().mean(-1, keepdim=True)
        layer.rounded = (x * scale).round().clamp(-8, 7) / scale
        return inputs

    def of_int4(layer, inputs, output):
        return torch.nn.functional.linear(layer.rounded, WeightQuant.apply(layer.weight), layer.bias)

    def top_half(layer, inputs):
        x, = inputs
        kept = x.abs().topk(x.shape[-1] // 2, dim=-1).indices
        return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))
    for name, layer in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            layer.register_forward_pre_hook(int4)
            layer.register_forward_hook(of_int4)
        if name.endswith("o_proj"):
            layer.register_forward_pre_hook(top_half)
    return tiny.torch_logits(model, tokens)


def test_a48(tmp_path):
    folder = save(tmp_path / "checkpoint", "masters", activation_bits=4)
    rewrite(folder, lambda state: {name: value.float() for name, value in state.items()})
    expected = a48_logits(folder, TOKENS)
    out, logits = exported(folder, tmp_path / "out")
    agree(logits, expected)
    model = Model.load(out, ctx_size=len(TOKENS))
    agree(model.forward([(model.new_sequence(), TOKENS)], "all"), expected)
    bits = [a.i for node in onnx.load(out / "model.onnx", load_external_data=False).graph.node for a in node.attribute
            if a.name == "activation_bits"]
    assert bits == [4, 8, 4, 8] * 2


def damaged(state):
    return {name: value | 3 if value.dtype == torch.uint8 else value for name, value in state.items()}


def without_scales(state):
    return {name: value for name, value in state.items() if not name.endswith("_scale")}


def with_bias(state):
    return state | {"model.layers.1.self_attn.o_proj.bias": torch.ones(FAMILIES["bitnet"]["hidden_size"])}


def configured(**about):
    return lambda folder: edit(folder, quantization_config={"quant_method": "bitnet", **FORMS["multiplied"], **about})


MISTAKES = {
    "codes": (lambda folder: rewrite(folder, damaged), None, "holds codes that are none of a ternary weight"),
    "bias": (lambda folder: rewrite(folder, with_bias), None, "has a bias"),
    "scales": (lambda folder: rewrite(folder, without_scales), None, "weight_scale' is missing"),
    "norms": (configured(use_rms_norm=True), None, "use_rms_norm"),
    "class": (configured(linear_class="linear"), None, "linear_class 'linear' cannot be read; supported"),
    "mode": (configured(quantization_mode="online"), None, "belong to different models"),
    "layers": (configured(modules_to_not_convert=["model.layers.0.mlp.down_proj"]), None, "modules_to_not_convert"),
    "bits": (configured(activation_bits=6), None, "activation_bits 6 cannot be read"),
    "precision": (lambda folder: None, "int4", "its weights are ternary and stay so; leave the precision out"),
    "plain": (lambda folder: (tiny.save_tiny("llama", folder), edit(folder, quantization_config=None)), "ternary", "not a ternary weight"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    make, precision, message = MISTAKES[mistake]
    folder = save(tmp_path / "checkpoint", "multiplied")
    make(folder)
    with pytest.raises(ValueError, match=message):
        export(folder, tmp_path / "out", precision)
    assert not [path for path in tmp_path.iterdir() if path != folder]


@pytest.mark.parametrize("layout", [layout for layout in TERNARY_LAYOUTS if layout != "panels"])
def test_layouts_mean_the_same(tmp_path, layout):
    folder = save(tmp_path / "checkpoint", "multiplied")
    _, expected = exported(folder, tmp_path / "panels")
    out, logits = exported(folder, tmp_path / "out", ternary_layout=layout)
    np.testing.assert_array_equal(logits, expected)
    assert (out / "model.onnx.data").read_bytes() != (tmp_path / "panels/model.onnx.data").read_bytes()
    assert errors(check._onnxruntime_logits(out, TOKENS), expected).max() < 0.3


def test_eight_bit_embedding_by_default(tmp_path):
    folder = save(tmp_path / "checkpoint", "multiplied")
    report = export(folder, tmp_path / "out", group_size=16)
    assert report["precision"] == "ternary" and set(report["weights"].values()) == {"int8/16", "ternary"}
    assert report["verify"]["rms_error"] < 0.05 and report["verify"]["checkpoint_in"] == "numpy"
    formats, config = Weights(tmp_path / "out").by_format(), read_architecture(Checkpoint(folder))
    assert {"ternary", "int8/16"} <= set(formats) and ", ternary, " in summary(tmp_path / "out")
    hidden, wide = config.hidden_size, config.num_heads * config.head_dim
    layer = (wide + 2 * config.kv_heads * config.head_dim) * hidden + hidden * wide + 3 * hidden * config.intermediate_size
    assert formats["ternary"][1] == config.num_layers * layer


def test_float8_embedding(tmp_path):
    rng = np.random.default_rng(6)
    values = torch.from_numpy(rng.integers(0, 256, (32, 48), np.uint8)).view(torch.float8_e4m3fn)
    save_file({"model.embed_tokens.weight": values}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    got = Checkpoint(tmp_path).weight("model.embed_tokens.weight", (32, 48)).read(3, 20)
    np.testing.assert_array_equal(got, values.float().numpy()[3:20])
