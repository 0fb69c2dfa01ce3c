"""Quantised checkpoints carry over: the codes of GPTQ, AWQ and HQQ against what their formats define, alone and in whole exports."""
import json

import numpy as np
import pytest
import quantised
import tiny
import torch
from quantised import awq, gptq, hqq
from safetensors.torch import load_file, save_file

from edgeattn.exporters import check
from edgeattn.exporters.checkpoint import Checkpoint, concatenate
from edgeattn.exporters.export import export
from edgeattn.exporters.interpret import interpret
from edgeattn.runtime import Model, read_config

TOKENS = np.random.default_rng().integers(0, tiny.SIZES["vocab_size"], 40)
SHAPE = dict(hidden_size=64, intermediate_size=96)

# pack, its options, and whether the codes carry over
FORMATS = [
    *((gptq, dict(bits=bits, group=32, version=version, symmetric=bits == 4), True) for bits in (2, 3, 4, 8) for version in (1, 2)),
    *((gptq, dict(bits=bits, group=32, act_order=True), True) for bits in (3, 4)),
    (gptq, dict(group=-1), True), (gptq, dict(group=-1, act_order=True), True), (gptq, dict(group=48), True), (gptq, dict(group=8), False),
    (gptq, dict(dtype=torch.bfloat16), True),
    (awq, dict(), True), (awq, dict(group=16, dtype=torch.float32), True), (awq, dict(group=8), False),
    *((hqq, dict(bits=bits, group=32), True) for bits in (8, 4, 3, 2, 1)), (hqq, dict(bits=3, group=16), True),
    (hqq, dict(group=8), False), (hqq, dict(group=128), False), *((hqq, dict(bits=bits, group=32, axis=0), False) for bits in (8, 4, 3, 2)),
]


def name(pack, options, *_):
    return f"{pack.__name__}-{'-'.join(f'{k}{v}' for k, v in options.items())}"


def weights_of(folder, exact):
    """(name, its Weight, what it should be) of every quantised matrix."""
    source = Checkpoint(folder)
    return [(name, source.weight(name, expected.shape), expected) for name, expected in exact.items()]


@pytest.mark.parametrize("pack, options, exact", [pytest.param(*f, id=name(*f)) for f in FORMATS])
def test_weights_are_what_the_format_defines(tmp_path, pack, options, exact):
    tiny.save_tiny("llama", tmp_path, **SHAPE)
    expected = quantised.quantise_folder(tmp_path, pack, **options)
    for _, weight, wanted in weights_of(tmp_path, expected):
        n, tolerance = wanted.shape[0], 1e-6 * np.abs(wanted).max()
        np.testing.assert_allclose(weight.read(0, n), wanted, atol=tolerance)
        for start, stop in ((0, 1), (16, 32), (n - 5, n), (3, n - 7)):
            np.testing.assert_allclose(weight.read(start, stop), wanted[start:stop], atol=tolerance)
        assert (weight.quantised is not None) == exact and weight.stored_as.startswith(pack.__name__)
        if exact:
            codes, scales, zeros = weight.quantised.read(0, n)
            block = weight.quantised.block_size
            assert codes.dtype == np.uint8 and codes.max() < 1 << weight.quantised.bits and 16 <= block <= 256
            assert scales.dtype == np.float32 and scales.shape == (n, -(-wanted.shape[1] // block))
            assert zeros is None or zeros.shape == scales.shape and zeros.dtype in (np.uint8, np.float32)
            if options.get("symmetric"):
                assert zeros is None  # no zero points to read where all are the middle


def logits(folder):
    model = Model.load(folder, ctx_size=len(TOKENS))
    return model.forward([(model.new_sequence(), TOKENS)], "all")


def exact_logits(folder):
    """Without the kernels' rounding of activations."""
    return interpret(folder, check._feeds(read_config(folder)["model"], TOKENS), ["logits"])["logits"]


def stock_logits(folder):
    return check._onnxruntime_logits(folder, TOKENS)


def error(got, expected):
    return np.sqrt(np.square(got - expected).mean()) / expected.std()


@pytest.mark.parametrize("pack, options", [
    (gptq, dict(bits=4, group=32)), (gptq, dict(bits=4, group=32, act_order=True)), (gptq, dict(bits=3, group=32)),
    (gptq, dict(bits=2, group=16)),
    (gptq, dict(bits=8, group=-1)), (awq, dict()), (hqq, dict()), (hqq, dict(bits=2, group=16)), (hqq, dict(axis=0))],
    ids=lambda value: value.__name__ if callable(value) else "-".join(f"{k}{v}" for k, v in value.items()))
def test_export_equals_the_dequantised_model(tmp_path, pack, options):
    model = tiny.save_tiny("llama", tmp_path / "checkpoint", **SHAPE)
    exact = quantised.quantise_folder(tmp_path / "checkpoint", pack, skip=("layers.1.mlp.down_proj",), **options)
    expected = tiny.torch_logits(quantised.with_weights(model, exact), TOKENS)
    report = export(tmp_path / "checkpoint", tmp_path / "out", "int8", group_size=16)  # of what is not quantised yet
    lossy = options.get("axis") == 0  # groups over outputs become floats, and those new codes
    for engine in (exact_logits, logits, stock_logits):
        assert error(engine(tmp_path / "out"), expected) < (0.05 if engine is exact_logits and not lossy else 0.15), engine
    assert bool(report["requantised"]) == lossy
    export(tmp_path / "checkpoint", tmp_path / "out", "fp32")
    assert error(logits(tmp_path / "out"), expected) < 1e-4


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, **changes):
    """changes: {end of a name: what becomes of the tensors whose names end so}"""
    tensors = load_file(folder / "model.safetensors")
    for end, change in changes.items():
        for name in [n for n in tensors if n.endswith(end)]:
            value = change(tensors.pop(name))
            tensors |= {} if value is None else {name: value.contiguous()}
    save_file(tensors, folder / "model.safetensors")


BREAK = {
    "by 'bitsandbytes', which cannot be read; supported: \\['awq', .*'gptq', 'hqq'\\]":
        (gptq, lambda c: edit_config(c, quant_method="bitsandbytes")),
    "by None, which cannot be read": (gptq, lambda c: edit_config(c, quant_method=None)),
    "checkpoint_format 'marlin' cannot be read": (gptq, lambda c: edit_config(c, checkpoint_format="marlin")),
    "bits must be one of \\[2, 3, 4, 8\\]": (gptq, lambda c: edit_config(c, bits=5)),
    "'bits' must be a whole number, got '4'": (gptq, lambda c: edit_config(c, bits="4")),
    "q_proj.scales' has shape \\[2, 64\\], config.json asks for \\[4, 64\\]": (gptq, lambda c: edit_config(c, group_size=16)),
    "q_proj.qweight' has shape \\[8, 64\\], config.json asks for \\[16, 64\\]": (gptq, lambda c: edit_config(c, bits=8)),
    "g_idx does not name groups of 32": (gptq, lambda c: edit_tensors(c, g_idx=torch.zeros_like)),
    "q_proj.qzeros' is missing": (gptq, lambda c: edit_tensors(c, qzeros=lambda x: None)),
    "is stored as I64; supported: \\['I32'\\]": (gptq, lambda c: edit_tensors(c, qweight=lambda x: x.long())),
    "a scale of the checkpoint is not finite": (gptq, lambda c: edit_tensors(c, scales=lambda x: x * float("nan"))),
    "version 'gemv' cannot be read": (awq, lambda c: edit_config(c, version="GEMV")),
    "bits must be 4": (awq, lambda c: edit_config(c, bits=8)),
    "q_proj.qweight' has shape \\[64, 4\\]": (awq, lambda c: edit_tensors(c, qweight=lambda x: x[:, :4])),
    "W_q \\[64, 32\\] does not hold 128 x 32 codes of 8 bits": (hqq, lambda c: edit_tensors(c, nbits=lambda x: x * 2)),
    "scale is not one float for each of 64 groups": (hqq, lambda c: edit_tensors(c, group_size=lambda x: x * 2)),
    "zero is not one float": (hqq, lambda c: edit_tensors(c, zero=lambda x: x.to(torch.uint8))),
    "and axis 2; readable": (hqq, lambda c: edit_tensors(c, axis=lambda x: x + 1)),
}


@pytest.mark.parametrize("message", BREAK)
def test_broken_checkpoint(tmp_path, message):
    pack, change = BREAK[message]
    tiny.save_tiny("llama", tmp_path / "checkpoint", **SHAPE)
    quantised.quantise_folder(tmp_path / "checkpoint", pack)
    change(tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=message) as caught:
        export(tmp_path / "checkpoint", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_dynamic_widths_and_a_head_of_codes(tmp_path):
    """GPTQ's `dynamic`: every matrix in its own bits and groups; siblings share the wider form, which holds both exactly."""
    model, rng = tiny.save_tiny("llama", tmp_path, **SHAPE, vocab_size=160), np.random.default_rng()
    tensors, exact = load_file(tmp_path / "model.safetensors"), {}
    for part, options in (("lm_head", dict(bits=8, group=32)), ("q_proj", dict(bits=4, group=64)), ("k_proj", dict(bits=2, group=16)),
                          ("v_proj", dict(bits=8, group=32)), ("up_proj", dict(bits=3, group=32))):
        for name in [n for n in tensors if f"{part}.weight" in n]:
            layer, exact[name] = gptq(tensors.pop(name).numpy(), rng, **options)
            tensors |= {name.removesuffix("weight") + key: value.contiguous() for key, value in layer.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    about = quantised.CONFIGS[gptq]() | dict(dynamic={"-:.*o_proj": {}}, lm_head=True)
    (tmp_path / "config.json").write_text(json.dumps(config | dict(quantization_config=about)))
    source, attention = Checkpoint(tmp_path), "model.layers.0.self_attn."
    together = concatenate([source.weight(f"{attention}{x}_proj.weight", exact[f"{attention}{x}_proj.weight"].shape) for x in "qkv"])
    assert (together.quantised.bits, together.quantised.block_size) == (8, 16)
    wanted = np.concatenate([exact[f"{attention}{x}_proj.weight"] for x in "qkv"])
    for rows in (together.read, together.quantised.rows):
        np.testing.assert_allclose(rows(10, 100), wanted[10:100], atol=1e-6)
    report = export(tmp_path, tmp_path / "out", "int8")
    assert report["weights"]["lm_head.weight"] == "int8/32"
    assert list(report["requantised"].values()) == ["floats + gptq 3 bits, groups of 32"] * 2  # up beside a gate that is floats
    assert error(exact_logits(tmp_path / "out"), tiny.torch_logits(quantised.with_weights(model, exact), TOKENS)) < 0.05


def test_codes_are_rounded_again_only_when_allowed(tmp_path, edgeattn):
    model = tiny.save_tiny("llama", tmp_path / "checkpoint", **SHAPE)
    exact = quantised.quantise_folder(tmp_path / "checkpoint", gptq)
    for options in (["--bits", "3"], ["--bits", "2", "--quantiser", "rtn"], ["--bits", "3.5"], ["--quantiser", "hqq"]):
        done = edgeattn("export", tmp_path / "checkpoint", "-o", tmp_path / "out", *options)
        assert done.returncode == 2 and "its weights are codes already, and kept" in done.stderr and not (tmp_path / "out").exists()
    done = edgeattn("export", tmp_path / "checkpoint", "-o", tmp_path / "out", "--bits", "3", "--quantiser", "rtn", "--allow-requantize")
    assert done.returncode == 0 and "quantised again, with loss: 8 tensors (gptq 4 bits, groups of 32)\n" in done.stderr
    assert {name: kind for name, kind in read_config(tmp_path / "out")["weights"].items() if "layers" in name}.keys() == \
        read_config(tmp_path / "out")["requantised"].keys()
    assert 0.05 < error(exact_logits(tmp_path / "out"), tiny.torch_logits(quantised.with_weights(model, exact), TOKENS)) < 1


def test_orders_that_differ_are_quantised_again(tmp_path, edgeattn):
    tiny.save_tiny("llama", tmp_path / "checkpoint", **SHAPE)
    quantised.quantise_folder(tmp_path / "checkpoint", gptq, act_order=True)
    edit_tensors(tmp_path / "checkpoint", **{"0.self_attn.q_proj.g_idx": lambda x: x.flip(0)})
    done = edgeattn("export", tmp_path / "checkpoint", "-o", tmp_path / "out")
    assert done.returncode == 0
    assert "quantised again, with loss, because no format here holds their codes: 1 tensors (gptq 4 bits, groups of 32)\n" in done.stderr
