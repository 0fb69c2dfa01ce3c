"""What a GPU does not run is said before a model is loaded, by its sizes, its graph and the plan of its cache. No GPU needed."""
import numpy as np
import pytest
import tiny
from imitated_gpu import make_backend
from onnx import helper

from edgeattn import runtime
from edgeattn.backend_cuda import CudaBackend
from edgeattn.cache.budget import plan_cache
from edgeattn.cache.options import CacheOptions
from edgeattn.cuda_limits import Pages, asked_refusal, check, decode_refusal, gives_way, prefill_refusal
from edgeattn.exporters.export import export
from edgeattn.kernels_cuda.page_pool import ANY, INT4
from edgeattn.page_formats import PageFormat
from edgeattn.policies import load_policy
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions

ABOUT = {"head_dim": 64, "num_heads": 32, "kv_heads": 8}
AUTO = SparseOptions(), PrefillOptions()


def settled(kind="f16", v_type=None, about=ABOUT, tokens=8192, ubatch=512, choices=AUTO, **more):
    """What gives_way() says of a cache of these types."""
    options = CacheOptions(kind, v_type or kind, **more)
    return gives_way(options, *choices, about, plan_cache(options, 16, about["kv_heads"], about["head_dim"], tokens, ubatch))


def test_what_gives_way_and_what_does_not():
    check(CacheOptions(budget=1 << 24), ABOUT)
    assert settled() == settled("int4") == settled("f32") == settled(choices=(SparseOptions("off"), PrefillOptions("off"))) == ("", "")
    dense, whole = settled(about=ABOUT | {"kv_heads": 2})
    assert "8 query heads" in dense and "8 query heads" in whole
    with pytest.raises(ValueError, match="--device cpu"):
        check(CacheOptions(), ABOUT | {"head_dim": 512})
    check(CacheOptions("int8", "int8", progressive=0.5), ABOUT)
    with pytest.raises(ValueError, match="--kv-progressive: .* 8 query heads"):
        check(CacheOptions("int8", "int8", progressive=0.5), ABOUT | {"kv_heads": 2})


def test_contexts_and_chunks_of_a_length():
    """Of what is chosen from; in calls of tensor cores and of the others, where a token of each KV head is a place."""
    assert settled(tokens=1 << 19) == ("", "") != settled(tokens=1 << 20) and not settled(tokens=1 << 20)[0]
    assert "524,288 tokens" in settled(tokens=1 << 20)[1] and "1,048,576 tokens" in settled(tokens=1 << 21)[0]
    assert settled(tokens=1 << 20, budget=1 << 30) == ("", "")  # of which a head holds fewer
    assert settled(ubatch=65535, tokens=65536) == settled("f32", ubatch=8192) == ("", "")
    with pytest.raises(ValueError, match="--ubatch-size 8193 .* 8192 at most"):
        settled("f32", tokens=65536, ubatch=8193)


@pytest.mark.parametrize("method, correction, pages, said", [
    ("anchor", None, Pages(80), "64 or 128 channels, this model's have 80"), ("xattention", None, Pages(96), "have 96"),
    ("sale", None, Pages(256), "have 256"), ("streaming", "delta", Pages(80), "--prefill-correction delta take heads of 64 or 128"),
    ("streaming", "tail", Pages(80), "--prefill-correction tail take heads of 64 or 128"),
    ("auto", "tail", Pages(128, ANY), "--prefill-correction tail read"), ("sale", "tail", Pages(64, INT4), ""),
    ("minference", None, Pages(80), "have 80"), ("proxy_attn", None, Pages(80), "have 80"),
    ("minference", None, Pages(64, ANY), "caches of f16"), ("xattention", None, Pages(64, INT4, rotated=True), "caches of f16"),
    ("pbs_attn", None, Pages(64, ANY), "caches of f16"), ("seer_attention", None, Pages(96, ANY), ""),
    ("dhsa_chunks", None, Pages(80, ANY), ""),
    ("auto", "delta", Pages(128, ANY), "--prefill-correction delta read"), ("minference", "delta", Pages(80), "choose in this way"),
    ("auto", None, Pages(80, ANY), ""), ("moa", None, Pages(256, ANY), ""), ("hip", None, Pages(96, ANY), ""),
    ("dhsa", None, Pages(96, INT4, rotated=True), ""),
    ("sale", None, Pages(128, ANY), ""), ("sale", None, Pages(64, rotated=True), "not rotated"),
    ("hip", None, Pages(64, rotated=True), "not rotated"), ("dhsa_chunks", None, Pages(64, ANY, rotated=True), ""),
    ("minference", "delta", Pages(128, INT4), "")])
def test_prompts_of_some_heads_and_caches(method, correction, pages, said):
    why = prefill_refusal(load_policy("prefill", method), correction, pages=pages)
    assert said in why and bool(why) == bool(said) and "\n" not in why


@pytest.mark.parametrize("method, works", [("quest", True), ("sink_window", True), ("hisa", True), ("infllm", True), ("loki", False),
                                           ("magic_pig", False)])
def test_scores_of_rotated_keys(method, works):
    assert ("rotated" in decode_refusal(load_policy("decode", method), pages=Pages(rotated=True))) != works


def test_what_is_asked_for_by_name_is_refused_without_a_model():
    off = SparseOptions("off"), PrefillOptions("off")
    assert not asked_refusal(*AUTO) and not asked_refusal(*off)
    assert not asked_refusal(SparseOptions("top_theta"), off[1])
    assert asked_refusal(off[0], PrefillOptions("hip", {"beam": 4096})).endswith("use --sparse-prefill off")
    assert not asked_refusal(off[0], PrefillOptions("streaming", correction="tail"))


@pytest.mark.parametrize("bits, input_major, said", [(2, 0, ""), (1, 0, "--ternary-layout panels"), (2, 1, "--ternary-layout panels")])
def test_layouts_of_ternary_weights(bits, input_major, said):
    node = helper.make_node("matmul_ternary", [], [], domain="edgeattn", bits=bits, input_major=input_major)
    if said:
        with pytest.raises(ValueError, match=said):
            check(CacheOptions(), ABOUT, [node])
    else:
        check(CacheOptions(), ABOUT, [node])


@pytest.mark.parametrize("op_type, domain, said", [("Add", "", ""), ("Split", "", ""), ("Gather", "", ""), ("Tanh", "", "Tanh"),
                                                   ("MatMulNBits", "com.microsoft", "MatMulNBits"), ("linear", "edgeattn", "")])
def test_nodes_without_a_kernel(op_type, domain, said):
    node = helper.make_node(op_type, ["x"], ["out"], domain=domain)
    if said:
        with pytest.raises(ValueError, match=f"no kernel for this model's {said}: use --device cpu"):
            check(CacheOptions(), ABOUT, [node])
    else:
        check(CacheOptions(), ABOUT, [node])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with heads of 80 channels."""
    made = tmp_path_factory.mktemp("tiny")
    tiny.save_tiny("llama", made / "checkpoint", hidden_size=320, head_dim=80, max_position_embeddings=1024)
    export(made / "checkpoint", made / "out", "int4", 32)
    return made / "out"


@pytest.mark.parametrize("prefill, said", [
    (PrefillOptions("minference"), "--sparse-prefill minference: .* have 80: use --sparse-prefill off"),
    (PrefillOptions("streaming", correction="delta"), "--sparse-prefill streaming: .*--prefill-correction delta .* have 80")])
def test_nothing_is_loaded_before(monkeypatch, folder, prefill, said):
    monkeypatch.setattr(runtime, "make_backend", lambda name: make_backend(monkeypatch))
    monkeypatch.setattr(runtime, "KVCache", None)
    with pytest.raises(ValueError, match=said):
        Model.load(folder, device="cuda", prefill=prefill)


def test_auto_reads_everything_where_a_correction_does_not_go(monkeypatch, folder):
    backend = make_backend(monkeypatch)
    monkeypatch.setattr(runtime, "make_backend", lambda name: backend)
    model = Model.load(folder, device="cuda", prefill=PrefillOptions("auto", {"budget": 64}, 0, "delta"), sparse=SparseOptions("off"))
    assert "have 80" in model.whole_because and model.prefill is None
    assert np.isfinite(model.forward([(model.new_sequence(), np.arange(3, 43))])).all()


@pytest.mark.parametrize("heads, pages", [("none", 32), ("duo", 32 + 17)])  # a chunk, and a page, before heads drop what is over
def test_scratch_for_choosing_pages_is_for_as_many_as_a_list_has(monkeypatch, folder, heads, pages):
    steps = []

    class Recording(type(make_backend(monkeypatch))):
        load = CudaBackend.load

        def step(self, *given):
            steps.append(CudaBackend.step(self, *given))
            return steps[-1]

        def table(self, made, workspace):
            return CudaBackend.table(self, made, workspace)
    monkeypatch.setattr(runtime, "make_backend", lambda name: Recording())
    monkeypatch.setattr(runtime, "head_classes", lambda *given: np.eye(2, dtype=bool))
    model = Model.load(folder, device="cuda", sparse=SparseOptions("oracle", {"dense_layers": 0}, 0), prefill=PrefillOptions("off"),
                       cache=CacheOptions("f16", "f16", heads=heads), ubatch=512)
    found, about = [step for step in steps if step.operator == "select_pages"], model.config["model"]
    assert len(found) == 2 and model.cache.plan.max_pages == pages
    scores, parts = (4 * runtime.MAX_SEQUENCES * about[name] * pages for name in ("kv_heads", "num_heads"))
    assert all(scores + 2 * parts <= step.workspace_bytes < 1.1 * (scores + 2 * parts) for step in found)


@pytest.mark.parametrize("clock, bus, processors, types, begins", [
    (3201, 6144, 132, "f16", (30_000, 40_000)), (3201, 6144, 132, "int4", (33_000, 40_000)), (3199, 128, 8, "int4", (3_000, 5_000))],
    ids=["H200, halves", "H200", "Orin Nano"])
def test_where_sparse_decode_begins(monkeypatch, clock, bus, processors, types, begins):
    """8 heads of 128: as measured on an H200, of quantised pages with one launch for both; where a slow memory makes it pay early."""
    from edgeattn.kernels_cuda import device, exchange
    monkeypatch.setattr(exchange, "_owner", None)
    backend = make_backend(monkeypatch)
    monkeypatch.setattr(device, "about", lambda: {"memory_clock_mhz": clock, "memory_bus_bits": bus, "processors": processors})
    formats = [PageFormat(128)] + [PageFormat(128, types, types)] * (types != "f16")
    found = backend.sparse_from(load_policy("decode", "auto"), {"f16": 4096, "int4": 1294}[types], formats)
    assert begins[0] < found < begins[1]


def test_one_model_of_a_process_has_blocks_that_wait_for_each_other(monkeypatch):
    from edgeattn.kernels_cuda import exchange
    monkeypatch.setattr(exchange, "_owner", None)
    first, second = make_backend(monkeypatch), make_backend(monkeypatch)
    given = [backend.cache_arguments([PageFormat(64)])["cache.exchange"] for backend in (first, second)]
    assert given[0] and not given[1]
    del first
    assert make_backend(monkeypatch).cache_arguments([PageFormat(64)])["cache.exchange"]
