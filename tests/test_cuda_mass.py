"""Attention mass between host and device: it is added up there, tokens are dropped here. No GPU needed: imitated_gpu.py, emulated_gpu."""
import subprocess
import sys
from pathlib import Path

import emulated_gpu
import numpy as np
import pytest
from test_cuda_host import launches_of, load, make_backend, tokens  # noqa: F401  load is a fixture

from edgeattn import backend_cuda, runtime
from edgeattn.cache import session
from edgeattn.cache.options import CacheOptions
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions

BUDGET = 1_400_000
FAULT = """
import sys
import conftest, emulated_gpu
emulated_gpu.install()
from test_cuda_attention import check_mass
from edgeattn.kernels_cuda import compile
source = compile.source
compile.source = lambda name: source(name).replace(*sys.argv[1:])
try:
    check_mass("f16", 64, 50, {}, 3, 3, 20)
    print("right")
except AssertionError:
    print("wrong")
"""


def held(sequence):
    sequence.fetch()
    used = np.arange(sequence.mass.shape[-1]) < sequence.counts[..., None]
    return [sequence.counts.copy(), sequence.positions * used, sequence.mass * used]


@pytest.mark.parametrize("eviction", ["h2o", "snapkv"])
def test_mass_stays_with_its_tokens(load, tmp_path, eviction):  # noqa: F811
    """Through forks, truncation and sessions, a part of which is the other device's; what one sequence receives no other does."""
    ids, more, found = tokens(200), tokens(600), []
    for device in ("cpu", "cuda"):
        model = load(device, "f16", budget=BUDGET, eviction=eviction)
        a = model.new_sequence()
        model.forward([(a, ids)], "none")
        b = model.fork(a)
        model.forward([(a, more[:9]), (b, more[9:10])], "none")
        kept = model.truncate(a, 180)
        model.forward([(a, ids[kept:190]), (b, more[:1])], "none")
        for i in range(20):
            model.forward([(a, more[i:i + 1]), (b, more[i + 1:i + 2])], "none")
        session.save(tmp_path / device, model.cache, b, np.r_[ids, more].tolist(), model.config, {})
        found += held(a) + held(b)
        model.free(a)
        model.forward([(b, more)], "none")
        found += held(b)
        model.free(b)
        c, _, _ = session.load(tmp_path / device, model.cache, model.config)
        found += held(c)
        model.forward([(c, more)], "none")
        found += held(c)
    half = len(found) // 2
    for expected, got in zip(found[:half], found[half:], strict=True):
        np.testing.assert_array_equal(got, expected)
    assert all(found[i].any() for i in range(half)) and found[6].max() < 500


def test_only_calls_with_probes_launch_more(monkeypatch, nano_int4):
    kept = []

    def make(name):
        class Recording(type(make_backend(monkeypatch))):
            def step(self, *given):
                kept.append(backend_cuda.CudaBackend.step(self, *given))
                return kept[-1]

            def load(self, operator):
                return backend_cuda.CudaBackend.load(self, operator)

            def table(self, made, workspace):
                return backend_cuda.CudaBackend.table(self, made, workspace)
        return Recording()
    monkeypatch.setattr(runtime, "make_backend", make)
    Model.load(nano_int4, cache=CacheOptions(budget=BUDGET, eviction="h2o"), ctx_size=1024, ubatch=128, sparse=SparseOptions("off"),
               prefill=PrefillOptions("off"), device="cuda")
    launches_of(monkeypatch, [])
    layers = sum(step.operator == "cached_attention" for step in kept)
    for tokens_, sequences in ((1, 1), (4, 4), (128, 2)):
        plain, probing = ([launch for step in kept for launch in step.launches(backend_cuda.Bucket(
            tokens_, 1, sequences, 512, False, False, probes))] for probes in (0, 1))
        assert len(probing) - len(plain) == 3 * layers > 0
        assert not any(launch.function.name.startswith("mass") for launch in plain)


@pytest.mark.skipif(bool(emulated_gpu.missing()), reason=emulated_gpu.missing())
@pytest.mark.parametrize("whole, part, said", [
    ("", "", "right"), ("        parts[warp][lane] = total;\n        __syncthreads();", "        parts[warp][lane] = total;", "wrong"),
    ("query < end && column <= own &&", "query < end &&", "wrong"), ("? kept[query] :", "? kept[probes.first] :", "wrong")])
def test_faults_show(whole, part, said):
    """A wait that is missing, tokens after a query, another query's sum."""
    done = subprocess.run([sys.executable, "-c", FAULT, whole, part], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stdout == f"{said}\n", done.stderr
