"""The commands as a user meets them: mistakes in one line, piped chat, formats of the benchmark, what inspect and doctor tell."""
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import onnx
import pytest

from edgeattn.apps import cli, doctor, generate, models, options
from edgeattn.apps.progress import Progress
from edgeattn.apps.weights import Weights
from edgeattn.cache.pages import CacheFull

NANO = Path(__file__).parent.parent / "models/nano"


# ---- mistakes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("line, message", [
    ("", "COMMAND"),
    ("fly", "invalid choice: 'fly'"),
    ("chat --no-such-flag", "unrecognized arguments: --no-such-flag"),
    ("generate -p", "expected one argument"),
    ("generate -p a -f b", "not allowed with"),
    ("generate -f /no/such/file", "/no/such/file: No such file or directory"),
    ("generate -f /", "/: Is a directory"),
    ("generate -p x -m /no/such/folder", "/no/such/folder: no such folder"),
    ("generate -p x -m org/name", "hf download org/name"),
    ("generate -p x -m {empty}", "neither an exported folder"),
    ("generate -p x -m {empty}/model.gguf", "is a file, but not GGUF"),
    ("generate -p x --temp hot", "invalid float value: 'hot'"),
    ("generate -p x --temp nan", "temperature must be a number, got nan"),
    ("generate -p x --top-p 2", "top_p must be more than 0, at most 1, got 2.0"),
    ("generate -p x --top-k -3", "top_k must be 0 (off) or more, got -3"),
    ("generate -p x --min-p 1.5", "min_p must be 0 to 1"),
    ("generate -p x --repeat-penalty 0", "repeat_penalty must be more than 0"),
    ("generate -p x -n -2", "must be a whole number of at least -1, got '-2'"),
    ("generate -p x -t 0", "must be a whole number of at least 1, got '0'"),
    ("generate -p x -c many", "got 'many'"),
    ("generate -p x -ub 0", "at least 1"),
    ("generate -p x -ctk q3", "invalid choice: 'q3'"),
    ("generate -p x -m {nano} -ctk f16 -ctv f32", "f32 is for both"),
    ("chat -m {empty} -p x", "neither an exported folder"),
    ("bench -p 0 -n 0", "nothing to measure"),
    ("bench -p 5,x", "got 'x'"),
    ("bench -d -1", "got '-1'"),
    ("bench -r 0", "at least 1"),
    ("bench -o xml", "invalid choice: 'xml'"),
    ("export", "required: CHECKPOINT, -o/--output"),
    ("export /no/such/folder -o x", "/no/such/folder: no such folder"),
    ("export nano -o {tmp}/x --precision int5", "invalid choice: 'int5'"),
    ("export nano -o {tmp}/x --target toaster", "unknown target 'toaster'"),
    ("export nano -o {tmp}/x --group-size 7", "group"),
    ("export nano -o {empty}", "is not an earlier export"),
    ("export nano -o /proc/nowhere/x", "/proc/nowhere"),
    ("inspect /no/such/folder", "no edgeattn.json"),
    ("verify {empty}", "no edgeattn.json"),
])
def test_mistakes_take_one_line(edgeattn, tmp_path, line, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "model.gguf").touch()
    words = [word.format(empty=empty, tmp=tmp_path, nano="nano") for word in line.split()]
    assert message in edgeattn.fails(*words)
    assert not (tmp_path / "x").exists()


def move_weights(folder, location):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "model.onnx.data").rename(folder / location)
    onnx.save(model, folder / "model.onnx")


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: (folder / "edgeattn.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / "edgeattn.json").write_text('{"format_version": 99}'), "format version 99"),
    (lambda folder: (folder / "model.onnx").unlink(), "no model.onnx"),
    (lambda folder: (folder / "model.onnx").write_bytes(b"\xff\xff\xff nonsense"), "model.onnx"),
    (lambda folder: (folder / "model.onnx.data").unlink(), "is missing"),
    (lambda folder: os.truncate(folder / "model.onnx.data", 5000), "cut short"),
    (lambda folder: move_weights(folder, "../weights.data"), "must be a file of the same folder, got '../weights.data'"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
    (lambda folder: (folder / "chat_template.jinja").unlink(), "no chat template"),
])
def test_damaged_exports_are_named(edgeattn, tmp_path, nano_int4, spoil, message):
    folder = shutil.copytree(nano_int4, tmp_path / "damaged")
    spoil(folder)
    assert message in edgeattn.fails("chat", "-m", folder, "-p", "hi")


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="no such folder"):
        cli.main(["--debug", "generate", "-p", "x", "-m", "/no/such/folder"])


@pytest.mark.parametrize("error, code", [(CacheFull("KV cache is\nfull"), 2), (RuntimeError("no\nluck"), 1), (MemoryError(), 1)])
def test_failures_take_one_line(edgeattn, monkeypatch, error, code):
    def fail(args):
        raise error
    monkeypatch.setattr(generate, "main", fail)
    done = edgeattn("generate", "-p", "x")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"edgeattn generate: error: {' '.join(str(error).split()) or 'MemoryError'}\n"


def test_help_is_there_and_light():
    watch = f"""import sys
from edgeattn.apps import cli
for verb in {list(cli.VERBS)}:
    try:
        cli.main([verb, "--help"])
    except SystemExit as leave:
        assert leave.code == 0
assert not {{"numpy", "numba", "onnx", "rich", "jinja2", "tokenizers"}} & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert re.findall("usage: edgeattn ([a-z]+)", done.stdout) == list(cli.VERBS)


def test_flags_are_llama_cpp_s():
    args = cli.make_parser().parse_args(
        "chat -m x -p hi -n 5 -c 99 -t 2 --temp 0 --top-k 1 --top-p 0.5 --min-p 0.1 --repeat-penalty 1.1 --repeat-last-n 9 -s 3 -ub 64 "
        "-r A --reverse-prompt B\\n --stop C -sys S -ctk f32 -ctv f32".split())
    assert args.stop == ["A", "B\n", "C"] and args.system_prompt == "S" and args.ubatch_size == 64
    assert options.cache_options(args).name == "f32"
    sampler = options.sampler_options(args)
    assert (sampler.temperature, sampler.top_k, sampler.min_p, sampler.repeat_last_n, sampler.seed) == (0, 1, 0.1, 9, 3)


def test_unescape():
    assert options.unescape(r"a\nb\\n\t\q") == "a\nb\\n\t\\q"


# ---- checkpoints, once ---------------------------------------------------------------------------------------------
def test_checkpoint_is_exported_once_and_again_when_it_changes(tmp_path, monkeypatch):
    def quick(source, target, precision, **_):
        if precision == "int8":
            raise ValueError("disk on fire")
        target.mkdir(parents=True)
        (target / "edgeattn.json").touch()
        return {"requantised": {}}
    monkeypatch.setattr("edgeattn.exporters.export.export", quick)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint = shutil.copytree(NANO, tmp_path / "mine", ignore=shutil.ignore_patterns("training"))
    folder = models.exported(str(checkpoint), "fp16")
    stamp = (folder / "edgeattn.json").stat().st_mtime_ns
    assert folder.parent == tmp_path / "cache/edgeattn/models" and folder.name.startswith("mine-fp16-")
    assert models.exported(str(checkpoint), "fp16") == folder and (folder / "edgeattn.json").stat().st_mtime_ns == stamp
    os.utime(checkpoint / "model.safetensors")
    (folder.parent / f".{folder.name}.999999999.tmp").mkdir()  # a killed export's, before the change
    again = models.exported(str(checkpoint), "fp16")
    with pytest.raises(ValueError, match="on fire"):
        models.exported(str(checkpoint), "int8")
    assert again != folder and [p.name for p in again.parent.iterdir()] == [again.name]  # neither the old nor the failed one
    assert models.exported(str(again)) == again


def test_layout_of_weights_is_part_of_an_export_s_name(monkeypatch, tmp_path):
    before = models._fingerprint(NANO)
    (tmp_path / "ops.py").write_text("PANEL = 32")
    monkeypatch.setattr("edgeattn.ops.__file__", str(tmp_path / "ops.py"))
    assert models._fingerprint(NANO) != before


def test_bundled_model_is_the_default(tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.find(None).samefile(NANO)
    (tmp_path / "nano").rmdir()
    assert models.find(None) == models.find("nano") and (models.find(None) / "model.safetensors").samefile(NANO / "model.safetensors")
    assert (models.find("nano-ternary") / "model.safetensors").is_file()


# ---- export, inspect, doctor ---------------------------------------------------------------------------------------
def test_export_tells_what_it_made(edgeattn, tmp_path):
    done = edgeattn("export", "nano", "-o", tmp_path / "out", "--precision", "int8", "-c", 512, "--target", "pi5")
    assert done.returncode == 0 and "int8" in done.stdout and "26.7 M parameters" in done.stdout and "context 512" in done.stdout


def test_progress_of_an_export_tells_of_its_check(capsys):
    with Progress("exporting", patience=0) as progress:
        for done in (1, 2, 3):
            progress.exporting(done, 3)
    assert capsys.readouterr().err.splitlines() == ["exporting ...", "checking against the checkpoint, which compiles kernels once ..."]


def test_weights_are_counted_once(nano_int4):
    weights = Weights(nano_int4)
    assert weights.params == 26_747_392
    assert weights.bytes - (3 << 20) < weights.token_bytes < weights.bytes  # all but the rotary tables: the tied head is read whole


def test_inspect_prints_what_goes_together(edgeattn):
    done = edgeattn("inspect", "--matrix")
    assert "zipcache" in done.stdout and "refused: " in done.stdout and not done.returncode
    assert "--sparse-prefill off anchor auto dhsa" in done.stdout and "--prefill-correction tail and delta" in done.stdout
    assert "give an exported folder" in edgeattn("inspect").stderr


def test_inspect_and_its_check(edgeattn, nano_int4, tmp_path):
    folder = shutil.copytree(nano_int4, tmp_path / "copy")
    good = edgeattn("inspect", folder, "--check")
    assert good.returncode == 0
    for text in ("int4/32", "cached_attention", "model.onnx.data", "26.7 M"):
        assert text in good.stdout
    with open(folder / "tokenizer.json", "a") as file:
        file.write(" ")
    bad = edgeattn("inspect", folder, "--check")
    assert bad.returncode == 1 and re.search(r"tokenizer.json +CHANGED", bad.stdout)
    assert json.loads(edgeattn("inspect", folder, "--json").stdout)["precision"] == "int4"


def test_verify_tells_figures_and_differences(edgeattn, nano_int4, tmp_path):
    assert "against onnxruntime: rms error" in edgeattn("verify", nano_int4, "--only", "export").stdout
    folder = shutil.copytree(nano_int4, tmp_path / "copy")
    (folder / "generation_config.json").write_text("{}")
    bad = edgeattn("verify", folder, "--only", "export")
    assert bad.returncode == 1 and "generation_config.json: missing or changed" in bad.stdout
    assert "/no/such: no such folder" in edgeattn.fails("verify", nano_int4, "--checkpoint", "/no/such")


def test_doctor_looks_for_all_that_the_package_needs():
    needed = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {name.split(">=")[0] for name in needed} == {*doctor.NEEDED} - {"llvmlite"}


def test_doctor_finds_what_is_missing(edgeattn, monkeypatch):
    good = edgeattn("doctor")
    assert good.returncode == 0
    for text in ("onnxruntime", "instructions", "kernel cache", "threads", "memory"):
        assert text in good.stdout
    monkeypatch.setattr(doctor, "NEEDED", ("numpy", "no-such-package"))
    bad = edgeattn("doctor")
    assert bad.returncode == 1 and "pip install no-such-package" in bad.stdout
