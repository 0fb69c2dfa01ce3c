"""What a decode step that reads pages in part leaves for the next one, and what launches it. No GPU needed: imitated_gpu.py."""
import numpy as np
import pytest
from test_cuda_host import launches_of, load, make_backend, tokens  # noqa: F401  load is a fixture

from edgeattn import backend_cuda, calibrate_thresholds, runtime
from edgeattn.cache import session
from edgeattn.cache.options import CacheOptions
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions

WAYS = {"certain": dict(cache="int8", progressive=0.02),
        "thresholds": dict(cache="int4", sparse=SparseOptions("top_theta", {"dense_layers": 1}, 0))}


@pytest.fixture(autouse=True)
def thresholds(monkeypatch):
    """Of a model that was not calibrated: 99 lets no page pass but the best ones."""
    def made(folder, config):
        found = np.zeros((config["model"]["num_layers"], config["model"]["num_heads"], 2), np.float32)
        found[..., 0] = 99
        return found
    monkeypatch.setattr(calibrate_thresholds, "load_thresholds", made)


@pytest.mark.parametrize("way", WAYS)
def test_forks_truncations_and_sessions_are_the_cpu_s(load, tmp_path, way):  # noqa: F811
    ids, more, found = tokens(400), tokens(60), []
    for device in ("cpu", "cuda"):
        model = load(device, **WAYS[way])
        a = model.new_sequence()
        model.forward([(a, ids)], "none")
        got = [model.forward([(a, more[i:i + 1])]) for i in range(35)]
        b = model.fork(a)
        got += [model.forward([(a, more[i:i + 1]), (b, more[-i:][:1])]) for i in range(1, 4)]
        kept = model.truncate(a, 390)
        got += [model.forward([(a, ids[kept:])])] + [model.forward([(a, more[i:i + 1])]) for i in range(3)]
        session.save(tmp_path / device, model.cache, b, [0] * b.length, model.config, {})
        c, _, _ = session.load(tmp_path / device, model.cache, model.config)
        got += [model.forward([(c, more[i:i + 1])]) for i in range(3)]
        found.append(got)
        if way == "certain":
            assert ((0 < c.confidence) & (c.confidence < 1)).any() or device == "cuda"
            c.fetch()
            found[-1].append(c.confidence)
    for expected, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("way", WAYS)
def test_only_steps_that_want_it_read_in_part(monkeypatch, nano_int4, way):
    kept = []

    class Recording(type(make_backend(monkeypatch))):
        load = backend_cuda.CudaBackend.load

        def step(self, *given):
            kept.append(backend_cuda.CudaBackend.step(self, *given))
            return kept[-1]

        def table(self, made, workspace):
            return backend_cuda.CudaBackend.table(self, made, workspace)
    monkeypatch.setattr(runtime, "make_backend", lambda name: Recording())
    cache = CacheOptions(WAYS[way]["cache"], WAYS[way]["cache"], progressive=WAYS[way].get("progressive", 0))
    model = Model.load(nano_int4, device="cuda", ctx_size=1024, ubatch=128, prefill=PrefillOptions("streaming", {}, 0), cache=cache,
                       sparse=WAYS[way].get("sparse", SparseOptions("off")))
    layers = model.cache.shape[0]
    for bucket, launches in launches_of(monkeypatch, kept).items():
        names = [launch.function.name for launch in launches]
        dense = layers * (not bucket.sparse) + bucket.sparse if way == "thresholds" else 0  # one layer's values are read whole
        assert names.count("attend_in_part") == layers - dense == names.count("write_tokens") - layers * (bucket.tokens > 1)
        assert sum(name.startswith("decode_") for name in names) == dense and all(min(launch.grid) > 0 for launch in launches)
