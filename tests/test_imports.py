"""Quantised checkpoints carry over: the codes of GPTQ, AWQ and HQQ against what their formats define, alone and in whole exports."""
import numpy as np
import pytest
import quantised
import tiny
import torch
from quantised import awq, gptq, hqq

from edgeattn.exporters import check
from edgeattn.exporters.checkpoint import Checkpoint
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
    (gptq, dict(dtype=torch.bfloat16), True), (awq, dict(), True), (awq, dict(group=16, dtype=torch.float32), True), (awq, dict(group=8), False),
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
    (gptq, dict(bits=4, group=32)), (gptq, dict(bits=4, group=32, act_order=True)), (gptq, dict(bits=3, group=32)), (gptq, dict(bits=2, group=16)),
    (gptq, dict(bits=8, group=-1)), (awq, dict()), (hqq, dict()), (hqq, dict(bits=2, group=16)), (hqq, dict(axis=0))],
    ids=lambda value: value.__name__ if callable(value) else "-".join(f"{k}{v}" for k, v in value.items()))
def test_export_equals_the_dequantised_model(tmp_path, pack, options):
    model = tiny.save_tiny("llama", tmp_path / "checkpoint", **SHAPE)
    exact = quantised.quantise_folder(tmp_path / "checkpoint", pack, skip=("layers.1.mlp.down_proj",), **options)
    expected = tiny.torch_logits(quantised.with_weights(model, exact), TOKENS)
    report = export(tmp_path / "checkpoint", tmp_path / "out", "int8")  # of what is not quantised yet
    lossy = options.get("axis") == 0  # groups over outputs become floats, and those new codes
    for engine in (exact_logits, logits, stock_logits):
        assert error(engine(tmp_path / "out"), expected) < (0.03 if engine is exact_logits and not lossy else 0.15), engine
    assert bool(report["requantised"]) == lossy
    export(tmp_path / "checkpoint", tmp_path / "out", "fp32")
    assert error(logits(tmp_path / "out"), expected) < 1e-4
