"""What edgeattn estimate promises, against what a run then takes."""
import json
import subprocess
from types import SimpleNamespace

import psutil
import pytest
from command import EDGEATTN
from tiny import save_tiny

from edgeattn.arena import covered
from edgeattn.cache.options import CacheOptions
from edgeattn.exporters.export import export
from edgeattn.memory_estimate import estimate
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions


def apart(*arguments):
    """JSON of the command in a process of its own, whose memory is nobody else's."""
    return json.loads(subprocess.run([*EDGEATTN, *map(str, arguments)], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("flags", [["-c", "2048"], ["-c", "4096", "--kv-bits", "4", "--sparse-min-len", "1024"]], ids=" ".join)
def test_within_a_tenth_of_a_prompt_that_fills_the_context(nano_int4, flags):
    prompt = ["bench", "-m", nano_int4, *flags, "-p", int(flags[1]) - 64, "-n", 0, "-r", 1, "-o", "json"]
    apart(*prompt)  # compiles kernels, which takes memory once; a shorter prompt would not compile all
    told = apart("estimate", "-m", nano_int4, *flags, "--json")
    row, = apart(*prompt)
    assert abs(told["total"] / row["peak_rss_bytes"] - 1) < 0.1
    assert told["total"] == told["weights"] + told["kv"] + told["workspace"] + told["runtime"]


@pytest.mark.parametrize("options", [CacheOptions("f16", "f16"), CacheOptions("int8", "int4"), CacheOptions(budget=2 << 20)], ids=str)
def test_pages_are_those_that_a_full_cache_has(nano_int4, options):
    model = Model.load(nano_int4, ctx_size=2048, cache=options, sparse=SparseOptions("off"), prefill=PrefillOptions("off"))
    told, sequence = estimate(model), model.new_sequence()
    model.forward([(sequence, [7] * (model.ctx_size - 1))], "none")
    pages = model.cache.stored_bytes(sequence)
    assert pages <= sum(told.kv_layers) <= pages + -(-model.ubatch // 32) * model.cache.pools[0].format.page_bytes * 16 + pages // 10
    assert told.kv_state == model.kv_bytes() - pages


def test_layers_with_a_sliding_window_keep_the_pages_behind_it(tmp_path):
    """As the cache does: attention reads the window alone, but nothing is dropped."""
    save_tiny("mistral", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", precision="fp32")
    model = Model.load(tmp_path / "out", ctx_size=256, ubatch=64)
    told, sequence = estimate(model), model.new_sequence()
    model.forward([(sequence, [7] * 255)], "none")
    assert model.config["model"]["window"] == 8
    assert told.kv_layers == [model.cache.stored_bytes(sequence) // 2] * 2


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_gpu_holds_already_is_not_asked_for_again(nano_int4, shared):
    """Loading copies weights there; a Jetson's memory is the CPU's as well."""
    model = Model.load(nano_int4, ctx_size=512)
    model.device, model.backend = "cuda", SimpleNamespace(free_bytes=lambda: (1 << 20, shared), device_bytes=lambda: (30 << 20, shared),
                                                          weight_bytes=7 << 20)
    told, free = estimate(model), psutil.virtual_memory().available
    assert told.weights == 7 << 20 and (told.on_device == 0) == shared
    assert told.on_device in (0, told.total - told.runtime)
    assert abs(told.available - (31 << 20)) < 1 if not shared else abs(told.available - free - (30 << 20)) < 1 << 30


def test_spans_that_overlap_count_once():
    assert covered([(0, 10), (5, 20), (30, 40), (32, 35)]) == 30


def test_a_line_says_whether_it_fits(edgeattn, nano_int4):
    lines = edgeattn("estimate", "-m", nano_int4, "-c", "2048").stdout.splitlines()
    assert "cache f16, 2048 tokens, on cpu" in lines[0] and "in all" in lines[6] and "enough" in lines[-1]
