"""edgeattn bench: what is measured, as which rows, and in which formats."""
import csv
import io
import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from command import EDGEATTN

from edgeattn.apps import record
from edgeattn.apps.bench_report import Row, Trial, make_report

ROW = Row(kind="bench", model="nano int4", setting="-ctk int4", command="edgeattn bench", machine="a board", date="2026-01-01",
          edgeattn="0", export="e", size_bytes=18 << 20, params=26_700_000, device="cpu", threads=2, kv_type="f16", ubatch=512,
          test="tg128", depth=0, n_prompt=0, n_gen=128, repetitions=5, tokens_per_second=123.456, deviation=1.5, peak_rss_bytes=90 << 20,
          weights_mapped_bytes=18 << 20, workspace_bytes=1 << 20, runtime_bytes=60 << 20, kv_bytes=4096,
          weight_bytes_per_token=16 << 20, read_bandwidth=2e10, token_ms=[8.0, 8.2])


def parse(name, text):
    if name == "md":
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
        return [dict(zip(rows[0], row)) for row in rows[2:]]
    if name == "csv":
        return list(csv.DictReader(io.StringIO(text)))
    return json.loads(text) if name == "json" else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", ["md", "csv", "json", "jsonl"])
@pytest.mark.parametrize("n", [0, 1, 3])
def test_reports_parse(name, n):
    file = io.StringIO()
    report = make_report(name, file, ["-ctk f16", "-ctk int4"], ["tg128"])
    for _ in range(n):
        report.add(ROW)
    report.close()
    rows = parse(name, file.getvalue())
    assert [row["test"] for row in rows] == ["tg128"] * n
    if n and name == "md":
        assert rows[0]["t/s"] == "123.46 ± 1.50" and rows[0]["setting"] == "-ctk int4" and "W" not in rows[0]
        assert len({len(line) for line in file.getvalue().splitlines()}) == 1
    elif n:
        assert float(rows[0]["tokens_per_second"]) == 123.456 and rows[0]["ttft_ms"] in ("", None)
        assert name == "csv" or Row(**rows[0]) == ROW


def test_columns_are_those_that_say_something():
    file = io.StringIO()
    make_report("md", file, [], []).add(Row(**vars(ROW) | {"watts": 4.5, "joules_per_token": 0.0364, "celsius": 61.2, "mhz": 1500.0,
                                                      "throttled": True}))
    row, = parse("md", file.getvalue())
    assert (row["W"], row["J/token"], row["°C"], row["MHz"]) == ("4.5", "0.036", "61", "1500 slowed") and "setting" not in row


@pytest.fixture(scope="module")
def rows(nano_int4):
    """Of a process of its own, whose memory is nobody else's."""
    done = subprocess.run([*EDGEATTN, "bench", "-m", nano_int4, "-p", "32", "-n", "4", "-pg", "64,2", "-d", "0,64", "-r", "2", "-o",
                           "jsonl", "-ub", "32", "-c", "256"], check=True, capture_output=True, text=True)
    return [Row(**json.loads(line)) for line in done.stdout.splitlines()]


def test_which_tests_run(rows):
    assert [row.test for row in rows] == ["pp32", "tg4", "pp64+tg2", "pp32 @ d64", "tg4 @ d64", "pp64+tg2 @ d64"]
    assert {(row.model, row.setting, row.kind, row.repetitions) for row in rows} == {("nano int4", "-c 256 -ub 32", "bench", 2)}
    assert all(row.command.startswith("edgeattn bench -m ") and row.machine and row.date for row in rows)


def test_times(rows):
    for row in rows:
        assert len(row.samples_s) == 2 and len(row.token_ms) == 2 * row.n_gen
        assert row.tokens_per_second == pytest.approx(np.mean([(row.n_prompt + row.n_gen) / s for s in row.samples_s]), rel=1e-3)
        assert (row.ttft_ms is None) == (row.n_prompt == 0) and (row.p50_ms is None) == (row.n_gen == 0)
        if row.n_gen:
            assert row.p50_ms <= row.p90_ms <= row.p95_ms <= max(row.token_ms)
            assert 0 < row.bandwidth_share == row.bandwidth / row.read_bandwidth
            assert sum(row.token_ms) / 1e3 + (row.ttft_ms or 0) * 2 / 1e3 == pytest.approx(sum(row.samples_s), rel=0.05)


def test_memory(rows):
    assert rows[4].kv_bytes_per_token == int(66.5 * 2 * 8 * 2 * 64 * 2) > rows[1].kv_bytes_per_token
    for row in rows:
        parts = row.weights_mapped_bytes, row.workspace_bytes, row.runtime_bytes, row.kv_bytes
        assert min(parts) > 0 and 0.9 * row.peak_rss_bytes < sum(parts) <= row.peak_rss_bytes
        assert 1.6e7 < row.weight_bytes_per_token
        assert 0.9 * row.weight_bytes_per_token < row.weights_mapped_bytes < row.size_bytes + (1 << 20)


def test_settings_run_apart(edgeattn, nano_int4):
    done = edgeattn("bench", "-m", nano_int4, "--sparse-attention", "quest,off", "--sparse-budget", "128")
    assert done.returncode == 2 and "needs --sparse-attention" in done.stderr and not done.stdout  # found before anything ran
    done = edgeattn("bench", "-m", nano_int4, "-p", "0", "-n", "2", "-d", "1024", "-r", "1", "-c", "1100", "-ctk", "f16,int8",
                    "--sparse-attention", "quest", "--sparse-budget", "128", "--sparse-min-len", "512", "--sparse-prefill", "off", "-o",
                    "jsonl", "--progress")
    assert done.returncode == 0 and "setting 2 of 2: -c 1100 -ctk int8" in done.stderr
    rows = [Row(**json.loads(line)) for line in done.stdout.splitlines()]
    sparse = " --sparse-attention quest --sparse-budget 128 --sparse-prefill off --sparse-min-len 512"
    assert [row.setting for row in rows] == [f"-c 1100 -ctk {kind}{sparse}" for kind in ("f16", "int8")]
    assert rows[1].kv_bytes < rows[0].kv_bytes
    whole = 2 * 8 * 2 * 64 * 2 * 1025.5
    index = 8 * 2 * 2 * 64 * 2 * 1025.5 / 32
    assert 0.25 * whole + index < rows[0].kv_bytes_per_token < 0.4 * whole + index  # two of eight layers read all, the others 4 pages


def test_a_setting_that_fails_loses_none_of_the_others(edgeattn, nano_int4):
    done = edgeattn("bench", "-m", nano_int4, "-p", "4", "-n", "0", "-r", "1", "-c", "256", "--kv-budget", "1K,8M", "-o", "jsonl")
    assert done.returncode == 1 and [json.loads(line)["setting"] for line in done.stdout.splitlines()] == ["-c 256 --kv-budget 8M"]
    assert "1 of 2 settings failed: -c 256 --kv-budget 1K" in done.stderr


def test_memory_of_the_compiler_is_not_measured(edgeattn, nano_int4, monkeypatch):
    started, counts = [], iter([10, 12, 12, 12, 12, 12])  # kernels in the cache: two more when the first process tells its first row
    monkeypatch.setattr("edgeattn.kernels_cpu.cached_kernels", lambda: next(counts))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, real=subprocess.Popen, **given: started.append(args) or real(*args, **given))
    done = edgeattn("bench", "-m", nano_int4, "-p", "4", "-n", "2", "-r", "1", "-c", "64", "-ctk", "f16,int8", "-o", "jsonl")
    assert [json.loads(line)["test"] for line in done.stdout.splitlines()] == ["pp4", "tg2"] * 2
    assert len(started) == 3 and started[0] == started[1] != started[2]


def test_what_a_file_holds_is_not_measured_again(edgeattn, nano_int4, tmp_path, monkeypatch):
    line = ["bench", "-m", nano_int4, "-p", "4", "-r", "1", "-c", "64", "-o", "jsonl", "--out", tmp_path / "kept.jsonl"]
    first = edgeattn(*line, "-n", "0")
    assert (tmp_path / "kept.jsonl").read_text() == first.stdout
    more = edgeattn(*line, "-n", "2")
    assert [json.loads(row)["test"] for row in more.stdout.splitlines()] == ["pp4", "tg2"] and more.stdout.startswith(first.stdout)
    assert (tmp_path / "kept.jsonl").read_text() == more.stdout
    monkeypatch.setattr("edgeattn.runtime.Model.load", lambda *_, **__: pytest.fail("nothing is left to measure"))
    assert edgeattn(*line, "-n", "2").stdout == more.stdout


def test_what_other_code_measured_is_measured_again(edgeattn, nano_int4, tmp_path):
    line, path = ["bench", "-m", nano_int4, "-p", "4", "-n", "0", "-r", "1", "-c", "64", "-o", "jsonl"], tmp_path / "kept.jsonl"
    row = json.loads(edgeattn(*line, "--out", path).stdout)
    path.write_text(json.dumps(row | {"edgeattn": "0.0.1"}) + "\n")
    done = edgeattn(*line, "--out", path)
    assert json.loads(done.stdout)["edgeattn"] == record.version() != "0.0.1" and len(path.read_text().splitlines()) == 2
    assert done.stderr.count("\n") == 1 and "1 of 1 results are of other versions of edgeattn (0.0.1; this is " in done.stderr
    assert "no such folder" in edgeattn.fails(*line, "--out", tmp_path / "no/kept.jsonl")
    assert "is a folder" in edgeattn.fails(*line, "--out", tmp_path)


def test_a_version_is_of_the_code_that_computes(monkeypatch, tmp_path):
    for name in ("edgeattn/policies", "edgeattn/apps", "kernels_cpu", "kernels_cuda"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "one.py").write_text("pass")
    monkeypatch.setattr(record, "find_spec", lambda name: SimpleNamespace(
        submodule_search_locations=[tmp_path / name.removeprefix("edgeattn.").replace(".", "/")]))
    version, found = record.version.__wrapped__, set()
    for name in ("edgeattn/policies/one.py", "kernels_cpu/one.py", "kernels_cuda/one.py", "kernels_cuda/two.cu"):
        found.add(version())
        (tmp_path / name).write_text("other")
    assert len(found | {version()}) == 5 and all(one.startswith("0.1.0+") for one in found)
    before = version()
    (tmp_path / "edgeattn/apps/one.py").write_text("other")
    (tmp_path / "kernels_cpu/one.pyc").write_text("other")
    assert version() == before


@pytest.mark.parametrize("n_prompt, n_gen", [(1, 0), (0, 1)])
def test_one_token(edgeattn, nano_int4, n_prompt, n_gen):
    done = edgeattn("bench", "-m", nano_int4, "-p", n_prompt, "-n", n_gen, "-r", 1, "-o", "jsonl", "--no-warmup")
    assert [row["test"] for row in parse("jsonl", done.stdout)] == ["pp1" if n_prompt else "tg1"] and done.returncode == 0


def test_beyond_the_context(edgeattn, nano_int4):
    assert "need a context of 9512, there are 8192" in edgeattn.fails("bench", "-m", nano_int4, "-d", 9000)
    assert "two numbers" in edgeattn.fails("bench", "-pg", "5")


def test_names_of_tests():
    assert Trial(64, 32, 4).name == "pp32+tg4 @ d64" and Trial(0, 0, 4).name == "tg4" and Trial(64, 32, 4).tokens == 100
