"""What the runtime does on the host for a GPU: copies, page lists, sessions, refusals. No GPU needed: imitated_gpu.py."""
import numpy as np
import pytest
import quantised
import tiny
from imitated_gpu import make_backend

from edgeattn import backend_cuda, devices, runtime
from edgeattn.cache import session
from edgeattn.cache.options import CacheOptions
from edgeattn.cuda_limits import decode_refusal
from edgeattn.exporters.export import export
from edgeattn.generation import Generation, SamplerOptions
from edgeattn.kernels_cuda.fused_steps import fuse
from edgeattn.policies import load_policy, policy_names
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions
from edgeattn.tokenizer import Tokenizer

RNG = np.random.default_rng()
CACHES = ["f16", "int8", "int4", "int3/int2"]
QUEST = SparseOptions("quest", {"budget": 128, "dense_layers": 1}, 0)


def tokens(n):
    return RNG.integers(4, 8000, n)


@pytest.fixture
def load(monkeypatch, nano_int4):
    """load("cuda"), load("cpu"): the same model with the same options."""
    def loaded(device, cache="f16", sparse=None, budget=None, eviction="auto", heads="none", storage="kivi", progressive=0.0, **more):
        if device == "cuda":
            monkeypatch.setattr(runtime, "make_backend", lambda name: make_backend(monkeypatch))
        k, _, v = cache.partition("/")
        kept = CacheOptions(k, v or k, storage, budget, eviction, heads=heads, progressive=progressive)
        options = dict(cache=kept, ctx_size=1024, ubatch=128, threads=1, sparse=sparse or SparseOptions("off"),
                       prefill=PrefillOptions("off"))
        model = Model.load(nano_int4, device=device, **options | more)
        monkeypatch.setattr(runtime, "make_backend", devices.make_backend)
        return model
    return loaded


@pytest.mark.parametrize("sparse", [None, QUEST], ids=["dense", "quest"])
@pytest.mark.parametrize("cache", CACHES)
def test_prompt_and_decode_are_the_cpu_s(load, cache, sparse):
    """Two sequences with pages that seal, a fork that goes its own way, a truncation."""
    ids, more, found = [tokens(300), tokens(77)], tokens(90), []
    for model in (load("cpu", cache, sparse), load("cuda", cache, sparse)):
        a, b = model.new_sequence(), model.new_sequence()
        got = [model.forward([(a, ids[0]), (b, ids[1])], "all")]
        for i in range(40):
            got.append(model.forward([(a, more[i:i + 1]), (b, more[i + 1:i + 2])]))
        c = model.fork(a)
        got.append(model.forward([(a, more[:5]), (c, more[5:8]), (b, more[:1])]))
        got.append(model.forward([(a, more[:1]), (c, more[1:2])]))
        kept = model.truncate(a, 200)
        got.append(model.forward([(a, ids[0][kept:250])], "all"))
        got.append(model.forward([(c, more[:1])]))
        model.free(c), model.free(b)
        got.append(model.forward([(a, more[:70])]))
        found.append(got)
    for expected, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_weights_in_act_order(monkeypatch, tmp_path):
    tiny.save_tiny("llama", tmp_path / "checkpoint")
    quantised.quantise_folder(tmp_path / "checkpoint", quantised.gptq, act_order=True)
    export(tmp_path / "checkpoint", tmp_path / "out", "int4")
    ids, found = RNG.integers(3, 150, 90), []
    for make in (devices.make_backend, lambda name: make_backend(monkeypatch)):
        monkeypatch.setattr(runtime, "make_backend", make)
        model = Model.load(tmp_path / "out", threads=1, sparse=SparseOptions("off"), prefill=PrefillOptions("off"))
        a = model.new_sequence()
        found.append([model.forward([(a, ids[:80])], "all"), *(model.forward([(a, ids[i:i + 1])]) for i in range(80, 90))])
    for expected, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_session_of_either_goes_on_with_the_other(load, tmp_path):
    ids, more = tokens(290), tokens(3)
    for first, second in (("cpu", "cuda"), ("cuda", "cpu")):
        model, other = load(first, "int4"), load(second, "int4")
        sequence = model.new_sequence()
        model.forward([(sequence, ids)], "none")
        session.save(tmp_path / "a", model.cache, sequence, ids.tolist(), model.config, {})
        restored, known, _ = session.load(tmp_path / "a", other.cache, other.config)
        assert known == ids.tolist()
        session.save(tmp_path / "b", other.cache, restored, known, other.config, {})
        for a, b in zip(pages(model, sequence), pages(other, restored), strict=True):
            np.testing.assert_array_equal(a, b)
        for token in more:
            np.testing.assert_array_equal(other.forward([(restored, [token])]), model.forward([(sequence, [token])]))


def pages(model, sequence):
    entries = sequence.tables[sequence.tables >= 0]
    for i, pool in enumerate(model.cache.pools):
        for array in pool.pages.stored().values():
            yield np.asarray(array[entries[entries % 4 == i] // 4])


def test_a_decode_step_takes_one_copy_and_page_lists_only_where_pages_were_taken(load):
    model = load("cuda")
    a, copies = model.new_sequence(), model.backend.copies
    model.forward([(a, tokens(33))])
    sizes = []
    for _ in range(40):
        copies.clear()
        model.forward([(a, tokens(1))], fetch=False)
        sizes.append(list(copies))
    assert [len(found) for found in sizes] == [2 if n % 32 == 0 else 1 for n in range(33, 73)]
    assert max(found[0] for found in sizes) < 40_000
    assert sizes[31][1] <= 4 * 2 * np.prod(model.cache.shape)  # the last column and the new one


def test_a_bucket_serves_all_that_fit_it(load):
    model = load("cuda")
    a, buckets = model.new_sequence(), model.backend.buckets
    model.forward([(a, tokens(250))])
    buckets.clear()
    for _ in range(10):
        model.forward([(a, tokens(1))])
    assert [bucket.slots for bucket in buckets] == [256] * 6 + [512] * 4
    assert all((bucket.tokens, bucket.rows, bucket.sequences, bucket.sparse) == (1, 1, 1, False) for bucket in buckets)
    assert len(set(buckets)) == 2 and all(bucket.decodes for bucket in buckets)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(seed=3), dict(temperature=0, repeat_penalty=1.3)],
                         ids=["greedy", "sampled", "penalty"])
def test_tokens_chosen_in_place_are_those_chosen_here(load, options, nano_int4):
    tokenizer, texts = Tokenizer(nano_int4), []
    for device in ("cpu", "cuda"):
        model = load(device)
        ids = tokenizer.encode("The lighthouse on Gull Island was built in 1871 by the engineer Anna Petrov. Who built it?")
        run = Generation(model, tokenizer, model.new_sequence(), ids, SamplerOptions(**options), 12, context_ids=[])
        list(run)
        texts.append(run.tokens)
    assert texts[0] == texts[1] and len(texts[0]) == 12


@pytest.mark.parametrize("eviction", ["auto", "l2_norm", "random", "streaming_llm", "h2o", "tova", "spatten", "caote", "zip_saliency"])
@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_a_full_cache_drops_the_cpu_s_tokens(load, cache, eviction):
    """A prompt of several times the budget, decoded tokens; going back over more than is there loses everything, as on the CPU."""
    ids, more, found = tokens(700), tokens(70), []
    for device in ("cpu", "cuda"):
        model = load(device, cache, budget=1_400_000 if cache == "f16" else 1_000_000, eviction=eviction)
        a = model.new_sequence()
        got = [model.forward([(a, ids)], "all")]
        got += [model.forward([(a, more[i:i + 1])]) for i in range(70)]
        assert a.counts.max() < 400 < a.length == 770
        got += [a.counts.copy(), a.positions.copy()]
        assert model.truncate(a, 769) in (0, 769)
        found.append([*got, model.forward([(a, more)])])
    for expected, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_sparse_steps_count_what_they_read(load):
    figures = []
    for device in ("cpu", "cuda"):
        model = load(device, "int4", QUEST)
        a = model.new_sequence()
        model.forward([(a, np.arange(4, 604))], "none")
        for token in range(5):
            model.forward([(a, [token + 4])])
        figures.append((model.scheduler.figures(), list(model.scheduler.explain())[-1]))
    assert figures[0] == figures[1] and figures[0][0]["read"] < 1


def test_weights_are_copied_once(load, nano_int4):
    model = load("cuda")
    data = (nano_int4 / "model.onnx.data").stat().st_size
    assert 0.95 * data < model.backend.weight_bytes < 1.05 * data + (1 << 16)


def launches_of(monkeypatch, model):
    """Every step's launches for several buckets, made by the CUDA kernels' own modules with no device."""
    from types import SimpleNamespace
    from edgeattn.kernels_cuda import compile
    monkeypatch.setattr(compile, "function", lambda name, kernel, shared=0: SimpleNamespace(ptr=1, name=kernel))
    buckets = [backend_cuda.Bucket(*numbers) for numbers in (
        (1, 1, 1, 256, False), (1, 1, 1, 1024, True), (4, 4, 4, 512, True), (128, 1, 1, 1024, False), (128, 0, 2, 1024, False),
        (64, 64, 1, 256, False), (128, 1, 1, 1024, False, True), (128, 0, 2, 512, False, True))]
    return {bucket: [launch for step in fuse(model, bucket.most()) for launch in step.launches(bucket)] for bucket in buckets}


@pytest.mark.parametrize("cache, choosing, prefill", [
    ("f16", "means", ("auto", {"budget": 64})), ("int8", "antidiagonals", ("xattention", {})), ("int4", "excess", ("sale", {})),
    ("int4", "lines", ("minference", {}, "delta")), ("f16", "spans", ("streaming", {})), ("int8", "ranks", ("dhsa", {}, "tail")),
    ("int8", "crossings", ("dhsa", {"mode": "vs"})), ("f16", "crossings", ("dhsa", {"mode": "vsb"})),
    ("int4", "samples", ("flex_prefill", {})), ("int8", "likeness", ("sparge_attn", {"similarity": 0.3})),
    ("f16", "samples", ("sample_attention", {}, "delta")), ("int4", "sorting", ("pbs_attn", {})), ("f16", "chunks", ("dhsa_chunks", {})),
    ("f16", "anchors", ("anchor", {"step": 3})), ("int4", "proxies", ("proxy_attn", {})), ("int8", "search", ("hip", {}))])
def test_launches_of_every_bucket(monkeypatch, nano_int4, cache, choosing, prefill):
    kept = []

    def make(name):
        imitation = type(make_backend(monkeypatch))

        class Recording(imitation):
            load = backend_cuda.CudaBackend.load

            def step(self, *given):
                kept.append(backend_cuda.CudaBackend.step(self, *given))
                return kept[-1]

            def table(self, made, workspace):
                return backend_cuda.CudaBackend.table(self, made, workspace)
        return Recording()
    monkeypatch.setattr(runtime, "make_backend", make)
    model = Model.load(nano_int4, cache=CacheOptions(cache, cache), ctx_size=1024, ubatch=128, sparse=QUEST,
                       prefill=PrefillOptions(*prefill[:2], 0, *prefill[2:]), device="cuda")
    made = launches_of(monkeypatch, kept)
    chosen = f"choose_by_{choosing}"
    for bucket, launches in made.items():
        names = [launch.function.name for launch in launches]
        corrected = (*prefill, "none")[2] if bucket.listed else "none"
        assert (chosen in names) == bucket.listed
        assert ("add_shifts" in names) == (corrected == "delta") and ("page_means" in names) == (corrected == "tail")
        assert names.count("write_tokens") == sum(name.endswith("prefill_64") for name in names)
        names = {launch.function.name for launch in launches}
        assert all(min(launch.grid) > 0 for launch in launches)
        one = {f"chosen_{'int4' if cache == 'int4' else 'mixed'}_64"} & names  # pages chosen and attended to by one launch
        assert bool({"select_pages"} & names | one) == bucket.sparse and bool(one) == (bucket.sparse and cache != "f16")
        kinds = {part for name in names for part in name.split("_")}
        assert "decode" in kinds and ("prefill" in kinds) == (bucket.tokens > 1)
    first = {step.operator: step for step in kept}["cached_attention"]
    held = model.backend._batch
    assert first.arguments["batch.slot_counts"] == held.address(held.held["slot_counts"])
    assert first.arguments["state"] == held.address(held.state)
    assert first.arguments["batch.compensation"] == 0
    assert first.arguments["batch.prefill_lists"] == held.address(held.prefill_lists)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, works", [("auto", True), ("quest", True), ("tidal_decode", True), ("sink_window", True), ("oracle", True),
                                         ("less_is_more", True), ("delta", True), ("infllm", True), ("landmark", True), ("loki", True),
                                         ("magic_pig", True), ("hisa", True), ("top_theta", True)])
def test_decode_policies(name, works):
    assert (not decode_refusal(load_policy("decode", name), 32, 8)) == works
    assert decode_refusal(load_policy("decode", name), 72, 8)


def test_devices_by_name(monkeypatch):
    monkeypatch.setattr(devices, "cuda_missing", lambda: "no driver")
    assert devices.make_backend("auto").device == devices.make_backend("cpu").device == "cpu"
    with pytest.raises(ValueError, match="cpu, cuda, auto"):
        devices.make_backend("gpu")


@pytest.mark.parametrize("line, said", [
    (["generate", "-p", "x", "--device", "cuda", "--sparse-prefill", "oracle"], "--sparse-prefill oracle: the GPU has no kernels"),
    (["calibrate", "--device", "cuda"], "on the CPU"), (["chat", "--device", "tpu"], "invalid choice"),
    (["generate", "-p", "x", "--device", "cuda"], "no NVIDIA driver"), (["verify", "FOLDER", "--device", "cuda"], "no NVIDIA driver")])
def test_commands_say_it_in_one_line(edgeattn, monkeypatch, nano_int4, line, said):
    from edgeattn.kernels_cuda import device

    def missing():
        raise ValueError("no NVIDIA driver was found (libcuda.so.1); install one, or run on the CPU with --device cpu")
    monkeypatch.setattr(device, "cupy", missing)
    done = edgeattn(*[str(nano_int4) if part == "FOLDER" else part for part in line])
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_doctor_and_matrix_tell_of_the_gpu(edgeattn):
    assert "GPU" in edgeattn("doctor").stdout
    assert "--device cuda: --kv-storage akvq bitnet" in edgeattn("inspect", "--matrix").stdout
