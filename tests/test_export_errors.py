"""Exports that must fail: one clear line, and nothing left behind. Memory of one that must not."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from edgeattn.exporters import check
from edgeattn.exporters.export import export
from edgeattn.exporters.graph import Graph
from edgeattn.runtime import read_config

RUNTIME_LOGITS = check._runtime_logits


@pytest.fixture(autouse=True)
def quick_check(monkeypatch):
    monkeypatch.setattr(check, "_runtime_logits", check._onnxruntime_logits)


@pytest.fixture
def checkpoint(tmp_path):
    tiny.save_tiny("llama", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_families_are_known_without_loading_them():
    told = "import sys; from edgeattn.exporters.families import families; print(families(), 'edgeattn.runtime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True)
    assert done.stdout == "['bitnet', 'llama', 'mistral', 'qwen2', 'qwen3'] False\n", done.stderr


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def rename_tensor(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.xx_proj"))


BREAK = {
    "layers.1.mlp.up_proj.weight' is missing": rename_tensor,
    "truncated": lambda c: cut(c / "model.safetensors", 50_000),
    "truncated or not": lambda c: cut(c / "model.safetensors", 5),
    "not a safetensors file": lambda c: (c / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"not json at all " * 4),
    "found \\['pytorch_model.bin'\\]": lambda c: (c / "model.safetensors").rename(c / "pytorch_model.bin"),
    "config.json: not found": lambda c: (c / "config.json").unlink(),
    "not valid JSON": lambda c: cut(c / "config.json", 50),
    "unknown model_type 'mixtral'; supported: \\['bitnet', 'llama', 'mistral', 'qwen2', 'qwen3'\\]":
        lambda c: edit_config(c, model_type="mixtral"),
    "unknown model_type 'graph'": lambda c: edit_config(c, model_type="graph"),
    "unknown model_type '..": lambda c: edit_config(c, model_type="../evil"),
    "has shape \\[150, 64\\], config.json asks for \\[151, 64\\]": lambda c: edit_config(c, vocab_size=151),
    "rope type 'yarn' is not supported": lambda c: edit_config(c, rope_parameters=dict(rope_type="yarn", factor=4.0)),
    "rope type 'dynamic' is not supported": lambda c: edit_config(c, rope_parameters=None, rope_scaling=dict(type="dynamic", factor=4.0)),
    "'factor' is missing": lambda c: edit_config(c, rope_parameters=dict(rope_type="linear")),
    "hidden_act 'gelu' is not supported": lambda c: edit_config(c, hidden_act="gelu"),
    "already quantised by 'fp8', which cannot be read; supported: \\['awq', .*'gptq', 'hqq'\\]":
        lambda c: edit_config(c, quantization_config=dict(quant_method="fp8")),
    "head_dim must be a multiple of 16, got 24": lambda c: edit_config(c, head_dim=24),
    "num_attention_heads must be a multiple of num_key_value_heads 3, got 4": lambda c: edit_config(c, num_key_value_heads=3),
    "lacks \\['hidden_size'\\]": lambda c: edit_config(c, hidden_size=None),
}


@pytest.mark.parametrize("message", BREAK)
def test_broken_checkpoint(tmp_path, checkpoint, message):
    BREAK[message](checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        export(checkpoint, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_missing_shard(tmp_path):
    tiny.save_tiny("llama", tmp_path / "checkpoint", shard="40KB")
    sorted((tmp_path / "checkpoint").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="this shard, named in model.safetensors.index.json, is missing"):
        export(tmp_path / "checkpoint", tmp_path / "out")


@pytest.mark.parametrize("options, message", [
    (dict(precision="int9"), "unknown precision 'int9'"), (dict(group_size=48), "group size must be one of"),
    (dict(target="toaster"), "unknown target 'toaster'; choose one of"),
    (dict(ctx_size=257), "ctx_size must be 1 to 256")])
def test_wrong_option(tmp_path, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out")


def test_progress_ends_with_all_bytes(tmp_path, checkpoint):
    told = []
    export(checkpoint, tmp_path / "out", "int8", progress=lambda *numbers: told.append(numbers))
    assert told == sorted(told) and told[-1][0] == told[-1][1] and [done == total for done, total in told].count(True) == 1


def interrupt(done, total):
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_interrupted_export_keeps_the_old_one(tmp_path, checkpoint, stop):
    export(checkpoint, tmp_path / "out", "int8")
    before = (tmp_path / "out/edgeattn.json").read_bytes()

    def fail(done, total):
        raise stop
    with pytest.raises(type(stop) if isinstance(stop, Exception) else stop):
        export(checkpoint, tmp_path / "out", progress=fail)
    assert (tmp_path / "out/edgeattn.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.mark.parametrize("name", ["out", "o[u]t"])
def test_killed_export_is_cleared_away_by_the_next(tmp_path, checkpoint, name):
    for end in ("tmp", "old"):
        (tmp_path / f".{name}.999999999.{end}").mkdir()  # larger than any process id
    export(checkpoint, tmp_path / name, "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["checkpoint", name])


def test_export_killed_between_two_renames_comes_back(tmp_path, checkpoint):
    export(checkpoint, tmp_path / "out", "int8")
    (tmp_path / "out").rename(tmp_path / ".out.999999999.old")
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, tmp_path / "out", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


def test_failing_rename_brings_the_old_export_back(tmp_path, checkpoint, monkeypatch):
    export(checkpoint, tmp_path / "out", "int8")
    rename = Path.rename

    def fail(path, target):
        if path.suffix == ".tmp":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError):
        export(checkpoint, tmp_path / "out", "fp32")
    assert read_config(tmp_path / "out")["precision"] == "int8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "out"]


@pytest.mark.parametrize("name", [".", "..", "../here"])
def test_current_folder_is_refused(tmp_path, checkpoint, monkeypatch, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="is the current folder or holds it"):
        export(checkpoint, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "here"]


def test_replaces_an_export_and_nothing_else(tmp_path, checkpoint):
    export(checkpoint, tmp_path / "out", "int8")
    assert export(checkpoint, tmp_path / "out", "fp32")["precision"] == "fp32"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not an earlier export"):
        export(checkpoint, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").exists() and not (tmp_path / "out.old").exists()


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_failing_check_names_the_layer(tmp_path, checkpoint, monkeypatch, precision):
    value = Graph.value

    def wrong(graph, name, array):  # a norm of layer 1 goes astray on its way to the graph
        return value(graph, name, array[::-1] * 3 if name == "model.layers.1.post_attention_layernorm.weight" else array)
    monkeypatch.setattr(Graph, "value", wrong)
    with pytest.raises(ValueError, match=r"logits differ .* layers.1.mlp differs \(relative error"):
        export(checkpoint, tmp_path / "out", precision, 16)
    assert not (tmp_path / "out").exists()


def test_verify(tmp_path, checkpoint):
    export(checkpoint, tmp_path / "out", "int8")
    assert check.verify(tmp_path / "out", checkpoint)["rms_error"] < 0.2
    assert check.verify(tmp_path / "out")["rms_error"] < 1e-6  # the same engine twice here, see quick_check
    with open(tmp_path / "out/model.onnx.data", "r+b") as file:
        file.write(b"\x55" * 64)
    with pytest.raises(ValueError, match="model.onnx.data: missing or changed"):
        check.verify(tmp_path / "out")


@pytest.mark.parametrize("ctx_size", [1, 23])
def test_contexts_shorter_than_the_check(tmp_path, checkpoint, monkeypatch, ctx_size):
    monkeypatch.setattr(check, "_runtime_logits", RUNTIME_LOGITS)  # it limits the context, onnxruntime does not notice
    assert export(checkpoint, tmp_path / "out", "fp32", ctx_size=ctx_size)["verify"]["tokens"] == ctx_size
    assert check.verify(tmp_path / "out")["tokens"] == ctx_size


MEMORY = """
import sys
sys.modules["scipy"] = None  # Numba imports it where it is installed, 18 MB that edgeattn does not use
from edgeattn.exporters import check
check.TORCH_BYTES, check.MAPPED_BYTES = 0, -1 << 40  # as for a large model
from edgeattn.exporters.export import export
export(sys.argv[1], sys.argv[2], sys.argv[3])
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))  # maxrss would include the parent's
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_peak_memory(tmp_path, precision):
    """67 million parameters, 268 MB as float32: three times the largest tensor and what Python itself takes stay below that."""
    sizes = dict(vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=16, head_dim=64)
    tiny.tiny_model("llama", **sizes).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint")
    command = [sys.executable, "-c", MEMORY, tmp_path / "checkpoint", tmp_path / "out", precision]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    largest = 4 * 8192 * 1024
    assert int(done.stdout) * 1024 < 3 * largest + (100 << 20)
