"""Whole tiny models on a GPU, or on an emulated one (EDGEATTN_EMULATE_CUDA=1), against the CPU: prompts, decode, lists, eviction, budgets.

tests/test_cuda_runtime.py is the same of a real model, which an emulation would take hours for. Random weights disturb: limits are wider.
"""
import shutil

import numpy as np
import pytest
import quantised
import tiny
from cuda_device import needs_cuda
from same_drops import SameDrops
from tiny_on_gpu import CLOSE, DENSE, RNG, SIZES, both, error, make, run

from edgeattn import calibrate_thresholds, principal_components, runtime
from edgeattn.cache import release as releasing
from edgeattn.cache.options import CacheOptions
from edgeattn.exporters.export import export
from edgeattn.scheduler import SparseOptions

pytestmark = needs_cuda


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("cache", ["f16", "int8", "int4"])
def test_prompt_and_decode(folder, cache):
    prompt, decoded = RNG.integers(3, 150, 150), RNG.integers(3, 150, 40)
    (_, *expected), (_, *got) = (run(model, prompt, decoded) for model in both(folder, CacheOptions(cache, cache)))
    for a, b in zip(got, expected):
        assert error(a, b) < CLOSE[cache]


@pytest.mark.parametrize("storage, types", [("hadamard", "int2"), ("bitnet", "int3"), ("akvq", "int3"), ("zipcache", "int3"),
                                            ("delta", "delta/int4")])
def test_other_ways_to_quantise(folder, storage, types):
    """Nearer to the same on the CPU than that is to pages that are not quantised; most tokens are sorted as there."""
    prompt, decoded, found, places = RNG.integers(3, 150, 260), RNG.integers(3, 150, 40), [], []
    k, _, v = types.partition("/")
    for model in (*both(folder, CacheOptions(k, v or k, storage, delta_threshold=2.5)), both(folder, CacheOptions("f16", "f16"))[0]):
        a, *rows = run(model, prompt, decoded)
        assert a.sealed.min() > 5 or len(found) == 2
        found.append(np.concatenate(rows)[256:])  # from where all of these seal pages
        if a.positions is not None:  # the page of each token among those that were sorted
            places.append(a.positions[..., :32 * a.sealed.min()].argsort() // 32)
    apart, exact = error(found[1], found[0]), error(found[2], found[0])
    alike = (places[0] == places[1]).mean() if places else 1
    print(f"{storage} {types}: {apart:.4f}, of what is not quantised {exact:.4f}; {100 * alike:.0f} % of tokens alike")
    assert apart < exact / 2 and alike > 0.9 and (not places or (places[0][..., 1:] < places[0][..., :-1]).any(-1).all())


@pytest.mark.parametrize("precision, group", [("int2", 64), ("int3", 32)])
def test_weights_of_few_bits(folder, tmp_path, precision, group):
    export(folder.parent / "checkpoint", tmp_path / "out", precision, group)
    prompt, decoded = RNG.integers(3, 150, 70), RNG.integers(3, 150, 5)
    (_, *expected), (_, *got) = (run(model, prompt, decoded) for model in both(tmp_path / "out", CacheOptions("f16", "f16")))
    for a, b in zip(got, expected):
        assert error(a, b) < CLOSE["f16"]


@pytest.mark.parametrize("group, act_order", [(32, True), (64, True), (128, False)])
def test_weights_of_gptq(folder, tmp_path, group, act_order):
    """Act-order: activations are put in the order of the groups before each product."""
    shutil.copytree(folder.parent / "checkpoint", tmp_path / "checkpoint")
    quantised.quantise_folder(tmp_path / "checkpoint", quantised.gptq, group=group, act_order=act_order)
    export(tmp_path / "checkpoint", tmp_path / "out", "int4", 32)
    prompt, decoded, models = RNG.integers(3, 150, 70), RNG.integers(3, 150, 5), both(tmp_path / "out", CacheOptions("f16", "f16"))
    assert [step.operator for step in models[1].plan.steps].count("gather_columns") == 4 * 2 * act_order  # of each layer
    (_, *expected), (_, *got) = (run(model, prompt, decoded) for model in models)
    for a, b in zip(got, expected):
        assert error(a, b) < CLOSE["f16"]


@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_decode_that_selects(folder, cache):
    prompt, decoded = RNG.integers(3, 150, 300), RNG.integers(3, 150, 12)
    models = both(folder, CacheOptions(cache, cache), SparseOptions("quest", {"budget": 96, "dense_layers": 0}, 0))
    (_, *expected), (_, *got) = (run(model, prompt, decoded) for model in models)
    assert error(got[0], expected[0]) < CLOSE[cache] and error(got[1], expected[1]) < 0.2
    dense, = (run(model, prompt, decoded)[2] for model in both(folder, CacheOptions(cache, cache))[:1])
    assert error(got[1], expected[1]) < error(dense, expected[1]) / 2


@pytest.mark.parametrize("way", ["certain", "thresholds"])
def test_decode_that_reads_pages_in_part(folder, monkeypatch, way):
    """Eight pages, whose values one range reads: of each query head those of the best page. Of keys the upper four bits, behind the first
    step."""
    curves = np.zeros((2, 4, 2), np.float32)
    curves[..., 0] = 99
    monkeypatch.setattr(calibrate_thresholds, "load_thresholds", lambda folder, config: curves)
    cache, sparse = CacheOptions("int8", "int8", window=32, progressive=0.001 if way == "certain" else 0), DENSE
    if way == "thresholds":
        sparse = SparseOptions("top_theta", {"dense_layers": 1, "means": False}, 0)
    prompt, decoded = RNG.integers(3, 150, 240), RNG.integers(3, 150, 8)
    found = [run(model, prompt, decoded)[2] for model in both(folder, cache, sparse)]
    dense = run(both(folder, CacheOptions("int8", "int8", window=32))[1], prompt, decoded)[2]
    apart, whole = error(found[1], found[0]), error(dense, found[0])
    print(f"{way}: {apart:.4f}, of what reads everything {whole:.4f}")
    assert apart < 2 * CLOSE["int8"] and apart < whole / 1.5


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Four layers, so that some read what others have chosen."""
    made = tmp_path_factory.mktemp("deep")
    tiny.save_tiny("llama", made / "checkpoint", **SIZES, num_hidden_layers=4)
    export(made / "checkpoint", made / "out", "int4", 32)
    return made / "out"


@pytest.mark.parametrize("method, options", [
    ("quest", {"budget": 160}), ("hisa", {"budget": 160, "blocks": 2}), ("infllm", {"budget": 288}), ("less_is_more", {"budget": 128})])
def test_scores_of_rotated_keys(deep, method, options):
    """Bounds are of keys as they were before, products of both rotated."""
    prompt, decoded = RNG.integers(3, 150, 430 if method in ("hisa", "infllm") else 310), RNG.integers(3, 150, 6)
    cache, sparse = CacheOptions("int4", "int4", "hadamard"), SparseOptions(method, {"dense_layers": 0} | options, 0)
    models = both(deep, cache, sparse)
    (_, _, expected), (_, _, got) = (run(model, prompt, decoded) for model in models)
    dense = run(both(deep, cache)[0], prompt, decoded)[2]
    apart, whole = error(got, expected), error(dense, expected)
    print(f"{method}: {apart:.4f}, dense {whole:.4f}; read {[model.scheduler.figures()['read'] for model in models]}")
    assert apart < whole / 3


@pytest.mark.parametrize("storage, types, budget", [
    ("zipcache", "int4", 320), ("delta", "delta/int4", 160), ("bitnet", "int3", 160), ("akvq", "int4", 160)])
def test_bounds_of_other_pages(folder, storage, types, budget):
    """Those that pages know, of two pools, and those of an index."""
    prompt, decoded, (k, _, v), found = RNG.integers(3, 150, 400), RNG.integers(3, 150, 6), types.partition("/"), []
    cache, sparse = CacheOptions(k, v or k, storage), SparseOptions("quest", {"budget": budget, "dense_layers": 0}, 0)
    models = both(folder, cache, sparse)
    for model in (*models, both(folder, cache)[0]):
        found.append(run(model, prompt, decoded)[2])
    apart, whole = error(found[1], found[0]), error(found[2], found[0])
    print(f"{storage}: {apart:.4f}, dense {whole:.4f}; read {[model.scheduler.figures()['read'] for model in models]}")
    assert apart < whole / 2


@pytest.mark.parametrize("method, options", [
    ("less_is_more", {"budget": 128}), ("delta", {"budget": 160}), ("infllm", {"budget": 288}), ("loki", {"budget": 160}),
    ("magic_pig", {"budget": 160}), ("hisa", {"budget": 160, "blocks": 2})])
@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_decode_by_other_scores(deep, monkeypatch, cache, method, options):
    """By the keys themselves, and by an index that decode goes on to fill; of two sequences at once."""
    turns = np.linalg.qr(RNG.standard_normal((4, 2, 64, 64)))[0].astype(np.float32)
    monkeypatch.setattr(principal_components, "load_components", lambda folder, config: turns)
    longer = 128 if method == "hisa" else 0  # so that there is a block to leave out
    prompts, decoded, found, read = [RNG.integers(3, 150, n + longer) for n in (300, 333)], RNG.integers(3, 150, (36, 2)), [], []
    sparse = SparseOptions(method, {"dense_layers": 0} | options, 0)
    for model in (*both(deep, CacheOptions(cache, cache), sparse, ctx_size=1024), both(deep, CacheOptions(cache, cache), ctx_size=1024)[0]):
        sequences = [model.new_sequence() for _ in prompts]
        for given in zip(sequences, prompts):
            model.forward([given], "none")
        found.append(np.stack([model.forward([(s, [token]) for s, token in zip(sequences, tokens)]) for tokens in decoded]))
        read.append(model.scheduler.figures()["read"] if model.scheduler else 1)
    apart, dense = error(found[1], found[0]), error(found[2], found[0])
    print(f"{cache} {method}: {apart:.4f}, dense {dense:.4f}; read {read}")
    assert apart < dense / 3 and abs(read[0] - read[1]) < 0.02 and read[1] < 0.9


def test_rows_of_an_index_are_the_cpu_s(deep, monkeypatch):
    """Those of a page, before it is the first one sealed and after, when what it gives back are other keys."""
    turns = np.linalg.qr(RNG.standard_normal((4, 2, 64, 64)))[0].astype(np.float32)
    monkeypatch.setattr(principal_components, "load_components", lambda folder, config: turns)
    sparse, ids = SparseOptions("loki", {"budget": 64, "recent": 2, "dense_layers": 0}, 0), RNG.integers(3, 150, 170)
    found = []
    for model in both(deep, CacheOptions("int2", "int2"), sparse):
        a, rows = model.new_sequence(), []
        model.forward([(a, ids[:110])], "none")
        for i in range(110, 170):
            model.forward([(a, ids[i:i + 1])])
            if i in (120, 169):
                index = a.index if a.mirror is None else a.mirror._held["index"].get()
                rows.append(index[:, :, 1].view(np.float16).astype(np.float32))
        found.append(rows)
    assert (a.sealed == 3).all()
    (floats, expected), (first, second) = found
    print(f"{error(first, floats):.4f}, {error(second, expected):.4f}; for the seal {error(floats, expected):.4f}")
    assert error(first, floats) < CLOSE["f16"] and error(second, expected) < error(floats, expected) / 1.5  # int2, of keys that differ


@pytest.mark.parametrize("heads", ["duo", "razor"])
@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_heads_that_stream(folder, monkeypatch, cache, heads):
    """One KV head of each layer drops what is neither its beginning nor recent; of razor a mean token stands for that."""
    monkeypatch.setattr(runtime, "head_classes", lambda *given: np.array([[True, False], [False, True]]))
    prompt, decoded, found = RNG.integers(3, 150, 500), RNG.integers(3, 150, 36), []
    for model in both(folder, CacheOptions(cache, cache, heads=heads)):
        a, *rows = run(model, prompt, decoded)
        assert a.counts.min() < 400 < a.counts.max()
        found.append(rows)
    whole = run(both(folder, CacheOptions(cache, cache))[0], prompt, decoded)[2]
    (prompted, stepped), (got, got_stepped) = found
    print(f"{cache} {heads}: {error(got, prompted):.4f} {error(got_stepped, stepped):.4f}; dense {error(whole, stepped):.4f}")
    assert error(got, prompted) < CLOSE[cache] and error(got_stepped, stepped) < min(CLOSE[cache], error(whole, stepped) / 2)


@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_pages_that_come_back(folder, cache):
    """Whole pages go by the attention they received, and are computed again for a prompt: the same ones, where rounding does not decide."""
    models = both(folder, CacheOptions(cache, cache, budget=420_000 if cache == "f16" else 330_000, eviction="adore"))
    for _ in range(4):
        prompt, more, decoded, found, gone = RNG.integers(3, 150, 400), RNG.integers(3, 150, 40), RNG.integers(3, 150, 34), [], []
        for model in models:
            a, _, rows = run(model, prompt, decoded)
            before = set(releasing.released(a))
            rows = [rows, model.forward([(a, more)], "all"), model.forward([(a, [5])])]
            assert before and before - set(releasing.released(a))
            found.append(rows), gone.append((sorted(before), sorted(releasing.released(a))))
            model.free(a)
        print(gone, [error(b, a) for a, b in zip(*found)])
        if gone[0] == gone[1]:
            break
    assert gone[0] == gone[1] and all(error(b, a) < CLOSE[cache] for a, b in zip(*found))


@pytest.mark.parametrize("eviction", ["key_diff", "l2_norm", "random", "streaming_llm", "h2o", "snapkv", "caote", "zipvl"])
@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_a_full_cache_drops_tokens(folder, monkeypatch, cache, eviction):
    """The GPU drops what the CPU has dropped (same_drops.py). zipvl: layers share by the attention that tokens receive."""
    options = dict(eviction="l2_norm", layer_budget="zipvl") if eviction == "zipvl" else dict(eviction=eviction)
    budget = 420_000 if cache == "f16" else 300_000
    prompt, decoded, found, drops = RNG.integers(3, 150, 400), RNG.integers(3, 150, 40), [], SameDrops(monkeypatch)
    for model in both(folder, CacheOptions(cache, cache, budget=budget, **options)):
        a, _, rows = run(model, prompt, decoded)
        assert a.counts.max() < 400
        found.append(rows)
        drops.follow()
    drops.finish()
    print(f"{cache} {eviction}: {len(drops.apart)} drops, scores {np.mean(drops.apart):.4f}, at most {max(drops.apart):.4f}; logits "
          f"{error(found[1], found[0]):.4f}")
    assert np.mean(drops.apart) < 0.1 and max(drops.apart) < 0.5 and error(found[1], found[0]) < CLOSE[cache]
