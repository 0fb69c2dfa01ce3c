"""Exports whose weights were calibrated, mixed or rescaled: what they store, what they lose, what they refuse."""
import subprocess
import sys

import numpy as np
import pytest
import tiny

from edgeattn.apps.cli import main
from edgeattn.exporters import attention_statistics, calibration_text, check, prepare, survey
from edgeattn.exporters.checkpoint import Checkpoint, Weight
from edgeattn.exporters.export import export
from edgeattn.exporters.families import read_architecture
from edgeattn.exporters.forward import forward, queries_keys_values
from edgeattn.exporters.mixed import Matrix, average, best_value, load, names
from edgeattn.exporters.mixed.loss import loss
from edgeattn.exporters.quantisers import awq
from edgeattn.exporters.rope import tables
from edgeattn.exporters.weight_statistics import Calibration
from edgeattn.reference.cached_attention import rotate

SIZES = dict(hidden_size=128, intermediate_size=192, num_hidden_layers=3)
TEXT = [np.random.default_rng(i).integers(0, 150, 96) for i in range(8)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Exports are compared in onnxruntime, and calibrated on random tokens: neither compiles kernels."""
    monkeypatch.setattr(check, "_runtime_logits", check._onnxruntime_logits)
    monkeypatch.setattr(prepare, "own_text", lambda *_: TEXT)


@pytest.fixture
def checkpoint(tmp_path):
    tiny.save_tiny("llama_bias", tmp_path / "checkpoint", **SIZES)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("case", ["qwen3", "qwen2"])
def test_statistics_are_those_of_the_inputs(tmp_path, case):
    model = tiny.save_tiny(case, tmp_path)
    source = Checkpoint(tmp_path)
    calibration, seen = Calibration(source, read_architecture(source), TEXT), {}
    for layer, block in enumerate(model.model.layers):
        for name, module in (("self_attn.qkv_proj", block.self_attn.k_proj), ("self_attn.o_proj", block.self_attn.o_proj),
                             ("mlp.gate_up_proj", block.mlp.up_proj), ("mlp.down_proj", block.mlp.down_proj)):
            module.register_forward_hook(lambda _, x, __, name=f"model.layers.{layer}.{name}.weight": seen.setdefault(name, []).append(
                x[0].detach().numpy().reshape(-1, x[0].shape[-1])))
    for tokens in TEXT:
        tiny.torch_logits(model, tokens)
    for name, inputs in seen.items():
        x, got = np.concatenate(inputs).astype(np.float64), calibration.of(name)
        np.testing.assert_allclose(got.hessian, x.T @ x / len(x), rtol=1e-3, atol=1e-3 * np.square(x).mean())
        np.testing.assert_allclose(got.magnitude, np.abs(x).mean(0), rtol=1e-3)


@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_statistics_of_heads_are_second_derivatives(tmp_path, case):
    """Of one token, what a small change of q, k or v does to its attention, against the quadratic form."""
    tiny.save_tiny(case, tmp_path, num_key_value_heads=4, hidden_size=64)
    source, rng = Checkpoint(tmp_path), np.random.default_rng()
    d, x = read_architecture(source), 2 * rng.standard_normal((attention_statistics.STEP, 64)).astype(np.float32)
    sums = attention_statistics.HeadSums(source, d, 0)
    sums.add(x)
    cos, sin = (table[:, None] for table in tables(d.frequencies, len(x)))
    q, k, _ = (part.reshape(len(x), -1, d.head_dim).astype(np.float64) for part in queries_keys_values(source, d, 0, x))

    def log_attention(q, k):
        scores = np.einsum("hd,jhd->hj", rotate(q, cos[:, 0], sin[:, 0])[-1], rotate(k, cos[:, 0], sin[:, 0])) * d.head_dim ** -0.5
        return scores - np.log(np.exp(scores).sum(1, keepdims=True))
    p = log_attention(q, k)
    for part, metrics in ((q, sums.q), (k, sums.k)):
        changed, change = part.copy(), 1e-2 * rng.standard_normal((d.num_heads, d.head_dim))
        changed[-1] += change
        now = log_attention(changed, k) if part is q else log_attention(q, changed)
        expected = np.einsum("ha,hab,hb->h", change, metrics, change) / d.head_dim / 2
        np.testing.assert_allclose((np.exp(p) * (p - now)).sum(1), expected, rtol=0.1, atol=1e-9)
    heads = sums.heads(np.eye(64, dtype=np.float32))
    mixed = np.einsum("hj,jc->hc", np.exp(p), x)
    o = source.weight("model.layers.0.self_attn.o_proj.weight", (64, d.num_heads * d.head_dim)).read(0, 64)
    for h, head in enumerate(heads[-d.kv_heads:]):
        change = rng.standard_normal((d.head_dim, 64))
        moved = o[:, h * d.head_dim:(h + 1) * d.head_dim] @ change @ mixed[h]
        np.testing.assert_allclose(np.trace(head.metric @ change @ head.hessian @ change.T), moved @ moved, rtol=1e-3)
    assert [head.start for head in heads] == list(range(0, heads[-1].stop, d.head_dim))


def test_moved_scales_change_nothing(checkpoint):
    source = Checkpoint(checkpoint)
    decoder = read_architecture(source)
    folded = awq.fold(source, decoder, Calibration(source, decoder, TEXT).of, lambda name: 3, 32)
    (*_, (_, expected)), (*_, (_, got)) = forward(source, decoder, TEXT[0]), forward(folded, decoder, TEXT[0])
    assert np.abs(got - expected).max() < 1e-3 * expected.std()
    name = "model.layers.1.self_attn.v_proj.weight"
    weights = [s.weight(name, (32, 128)).read(0, 32) for s in (source, folded)]
    assert np.abs(weights[0] - weights[1]).max() > 0.01


@pytest.mark.parametrize("precision, quantiser", [("int2", "gptq"), ("int2", "boa"), ("int3", "gptq"), ("int3", "hqq"), ("int3", "awq"),
                                                  ("int4", "gptq")])
def test_quantisers_run_in_stock_onnxruntime(tmp_path, checkpoint, precision, quantiser):
    report = export(checkpoint, tmp_path / "out", precision, quantiser=quantiser)
    bits = int(precision[3:])
    assert set(report["weights"].values()) == {f"int{bits}/32", "int8/32"} and report["quantiser"] == quantiser
    assert report["verify"]["rms_error"] < {2: 1.2, 3: 0.8, 4: 0.3}[bits]


def test_gptq_beats_rounding_in_an_export(tmp_path, checkpoint):
    source = Checkpoint(checkpoint)
    decoder = read_architecture(source)
    kl = {}
    for quantiser in ("gptq", "rtn"):
        export(checkpoint, tmp_path / quantiser, "int3", quantiser=quantiser)
        kl[quantiser] = check.divergence(tmp_path / quantiser, source, decoder, TEXT[0])
    assert kl["gptq"] < kl["rtn"]


def test_a_model_says_its_own_text(tmp_path, checkpoint, monkeypatch):
    said, told = [], []
    monkeypatch.setattr(calibration_text, "LENGTH", 40)
    monkeypatch.setattr(calibration_text, "SEQUENCES", 7)
    monkeypatch.setattr(prepare, "own_text", lambda *given: said.extend(calibration_text.own_text(*given)) or said)
    report = export(checkpoint, tmp_path / "out", "int3", preparing=lambda *given: told.append(given))
    assert report["quantiser"] == "gptq" and [len(ids) for ids in said] == [40] * 7
    assert len({tuple(ids) for ids in said}) == 7 and all(0 <= ids.min() and ids.max() < 150 for ids in said)
    source = Checkpoint(checkpoint)
    for _, logits in forward(source, read_architecture(source), said[0]):
        pass
    ranks = (logits[1:-1] > np.take_along_axis(logits[1:-1], said[0][2:, None], 1)).sum(1)
    assert ranks.mean() < 35  # of 150: what it says is what it thinks likely
    assert told[-1][1] == told[-1][2] and not (tmp_path / "out/speaker").exists()


def matrices(rng):
    return [Matrix(f"model.layers.{layer}.{name}", layer, size, divergence=float(rng.random()), similarity=float(rng.random()),
                   tail=float(rng.random())) for layer in range(12) for name, size in
            (("qkv", 393216), ("o", 262144), ("gate_up", 1441792), ("down", 720896))]


@pytest.mark.parametrize("bits", [2.1, 2.5, 3.0, 3.25, 3.9, 5.5, 7.9])
@pytest.mark.parametrize("name", names())
def test_average_is_met(name, bits):
    found = matrices(np.random.default_rng())
    widths = load(name).widths(found, bits)
    assert set(widths) == {m.name for m in found} and set(widths.values()) <= {2, 3, 4, 8}
    assert 0.99 * bits <= average(found, widths) <= bits + 1e-6


def test_bits_go_where_they_save_most():
    found = matrices(np.random.default_rng())
    widths = best_value(found, 3.0, loss)
    chosen = sum(loss(m, widths[m.name]) for m in found)
    assert chosen <= sum(loss(m, 3) for m in found)
    for m in found:  # the most important matrices of a size are nowhere narrower than less important ones
        assert all(widths[m.name] >= widths[o.name] for o in found if o.size == m.size and o.divergence < m.divergence - 0.3)


@pytest.mark.parametrize("mixed", names())
def test_mixed_export(tmp_path, checkpoint, mixed):
    report = export(checkpoint, tmp_path / "out", "int3.25", mixed=mixed)
    about = report["mixed"]
    assert about["method"] == mixed and 3.0 < about["bits"] <= 3.25 and about["predicted_kl"] > 0
    assert 0.2 * about["predicted_kl"] < about["measured_kl"] < 5 * about["predicted_kl"]
    assert len(set(report["weights"].values())) >= 3


def test_survey_sees_what_is_worse(checkpoint):
    source = Checkpoint(checkpoint)
    decoder = read_architecture(source)
    shape = {"o_proj": (128, 64), "down_proj": (128, 192)}
    weights = {f"model.layers.{i}.{part}.{name}.weight": source.weight(f"model.layers.{i}.{part}.{name}.weight", shape[name])
               for i in range(3) for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj"))}
    found = survey.Survey(source, decoder, weights, TEXT, "rtn", 32)
    for what in ("divergence", "similarity", "tail"):
        getattr(found, what)(lambda *_: None)
    assert all(m.divergence > 0 and -1 <= m.similarity <= 1 and 0 < m.tail < 0.5 for m in found.matrices)
    name = found.matrices[0].name
    coarse = survey.Survey(source, decoder, {name: Weight((128, 64), lambda a, b: 2 * weights[name].read(a, b))}, TEXT, "rtn", 32)
    coarse.divergence(lambda *_: None)  # another matrix than the checkpoint's: the damage is seen
    assert coarse.matrices[0].divergence > found.matrices[0].divergence


ERRORS = [(dict(precision="int1.5"), "unknown precision 'int1.5'"),
          (dict(precision="int9"), "unknown precision"), (dict(quantiser="magic"), "unknown quantiser 'magic'; choose one of"),
          (dict(precision="int3.25", mixed="magic"), "unknown method 'magic'"),
          (dict(precision="fp16", quantiser="gptq"), "rounds nothing"),
          (dict(precision="int3", group_size=16), "group size of 32 or more")]


@pytest.mark.parametrize("options, message", ERRORS)
def test_wrong_options(tmp_path, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_command(tmp_path, checkpoint, capsys):
    command = ["export", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main([*command, "--bits", "2.75"]) == 0
    assert "bits a weight by loss, KL" in capsys.readouterr().out
    for wrong in (["--bits", "1.5"], ["--bits", "3", "--quantiser", "magic"], ["--calibration", str(tmp_path)], ["--mixed", "magic"]):
        assert main([*command[:-1], str(tmp_path / "other"), *wrong]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("edgeattn export: error: ")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_calibration_text(tmp_path):
    nano = tiny.Path(__file__).parent.parent / "models/nano"
    text = tmp_path / "text.txt"
    text.write_text("The keeper climbed the stairs. " * 20)
    with pytest.raises(ValueError, match="tokens are too few to calibrate on; give at least 2048"):
        calibration_text.read_text(text, nano, 8192, 8192)
    text.write_text("The keeper climbed the stairs and counted ships. " * 2000)
    pieces = calibration_text.read_text(text, nano, 8192, 8192)
    assert len(pieces) == 32 and {len(piece) for piece in pieces} == {512}
    with pytest.raises(ValueError, match="no tokenizer.json"):
        calibration_text.read_text(text, tmp_path, 8192, 8192)
    text.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        calibration_text.read_text(text, nano, 8192, 8192)


MEMORY = """
import sys
import numpy as np
from edgeattn.exporters import check, prepare
prepare.own_text = lambda *_: [np.arange(256) % 500 for _ in range(8)]
check.TORCH_BYTES, check.MAPPED_BYTES = 0, -1 << 40  # as for a large model
from edgeattn.exporters.export import export
export(sys.argv[1], sys.argv[2], "int3")
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_memory_does_not_grow_with_layers(tmp_path):
    peaks = []
    for layers in (2, 8):
        tiny.save_tiny("llama", tmp_path / f"{layers}", vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers,
                       num_attention_heads=8, head_dim=64)
        done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / f"{layers}", tmp_path / "out"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    layer = 4 * (3 * 512 * 1536 + 3 * 512 * 512)
    assert peaks[1] - peaks[0] < 1.5 * layer  # six layers more
