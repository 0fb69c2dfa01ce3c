"""Ternary checkpoints: every stored form, against transformers' own layers and against the others."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import BitNetQuantConfig
from transformers.integrations.bitnet import pack_weights, replace_with_bitnet_linear

from edgeattn.exporters import check, export as export_module
from edgeattn.exporters.checkpoint import Checkpoint
from edgeattn.exporters.export import export
from edgeattn.exporters.families import read_architecture
from edgeattn.exporters.interpret import interpret
from edgeattn.runtime import Model, read_config

TOKENS = np.random.default_rng(4).integers(0, tiny.SIZES["vocab_size"], 40)
FORMS = {"masters": dict(linear_class="autobitlinear", quantization_mode="online"),
         "multiplied": dict(linear_class="autobitlinear", quantization_mode="offline"),
         "divided": dict(linear_class="bitlinear", quantization_mode="offline")}
FAMILIES = {"bitnet": dict(hidden_size=128, head_dim=32, intermediate_size=160), "llama": dict(intermediate_size=96)}


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """transformers compiles its ternary layers; uncompiled they say the same."""
    monkeypatch.setattr(torch._dynamo.config, "disable", True)


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
    state = {name: value if value.dtype == torch.uint8 else value.float() for name, value in load_file(folder / "model.safetensors").items()}
    model = tiny.tiny_model(family, **FAMILIES[family])
    replace_with_bitnet_linear(model, ["lm_head"], BitNetQuantConfig(**FORMS[form]))
    if form == "multiplied":  # as its loader does
        from transformers.integrations.bitnet import unpack_weights
        state = {name: unpack_weights(value, torch.float32) if value.dtype == torch.uint8 else value for name, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return tiny.torch_logits(model, tokens)


def exported(folder, out, precision="fp32"):
    """(folder, logits in NumPy): by default embedding and head are floats, so that nothing but the ternary layers rounds."""
    export(folder, out, precision, 16)
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
        save_file({name: value.float() for name, value in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors")
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
