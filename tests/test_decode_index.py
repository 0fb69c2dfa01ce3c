"""What methods promise that read an index of the keys: hisa, infllm, landmark, loki, magic_pig; and the principal components of keys."""
import json
import shutil

import numpy as np
import pytest
from imitated_gpu import make_backend

from edgeattn import devices
from edgeattn.cache.options import CacheOptions
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.principal_components import load_components, measure_components, save_components
from edgeattn.reference.select_pages import representative
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions
from sparse_driver import CONFIG, DEPTH, GROUP, KV_HEADS, LAYERS, SparseDriver, model_folder

HELD = 1500
F16, INT4 = CacheOptions(k_type="f16", v_type="f16"), CacheOptions(k_type="int4", v_type="int4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text():
    """q, k, v [layers, tokens, heads, head_dim]; keys with a mean."""
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal((LAYERS, HELD + 1, n, DEPTH), np.float32) for n in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    k[..., :6] += 1
    return q, k, v


def lists(method, text, folder, cache=F16, **options):
    """-> (what a step chooses, the driver, its sequence); policies without an option ignore it."""
    model = SparseDriver(method, {"budget": 512, "dense_layers": 0} | options, cache, folder=folder)
    sequence = model.cache.new_sequence()
    for first in range(0, HELD, 512):
        model.forward([(sequence, [x[:, first:min(HELD, first + 512)] for x in text])], check=False)
    return model.decode(sequence, [x[:, HELD:] for x in text])[1], model, sequence


def keys_and_queries(model, sequence, text, layer, head):
    """Keys as the cache has them and the step's queries of that KV head, rotated."""
    queries = model.rotated(text[0][layer, HELD:], sequence)[0, head * GROUP:(head + 1) * GROUP]
    return model.cache.read(sequence, layer, head)[0].astype(np.float64), queries.astype(np.float64)


def every(model):
    return np.ndindex(LAYERS, KV_HEADS)


@pytest.mark.parametrize("cache", [F16, INT4], ids=["f16", "int4"])
def test_hisa_with_blocks_for_everything_is_quest(text, folder, cache):
    assert lists("hisa", text, folder, cache)[0] == lists("quest", text, folder, cache)[0]


@pytest.mark.parametrize("cache", [F16, INT4], ids=["f16", "int4"])
@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_hisa_chooses_inside_the_best_blocks(text, folder, cache, blocks):
    found, model, sequence = lists("hisa", text, folder, cache, blocks=blocks)
    total = -(-sequence.length // PAGE)
    for layer, head in every(model):
        keys, queries = keys_and_queries(model, sequence, text, layer, head)
        last = total - 3 if cache is F16 else int(sequence.sealed[layer, head])
        middle = np.arange(1, (last - 1) // 4)
        means = np.stack([keys[b * 128:(b + 1) * 128].mean(0) for b in middle])
        best = middle[np.argsort(-(queries @ means.T).max(0))[:blocks - 2]]
        scored = [page for page in found[layer][head] if 1 <= page < last]
        assert {page // 4 for page in scored} <= {0, (last - 1) // 4, *best}
        assert len(scored) == min(len([p for p in range(1, last) if p // 4 in {0, (last - 1) // 4, *best}]), 16 - 1 - (total - last))


@pytest.mark.parametrize("method, block, options", [("infllm", 4, {}), ("landmark", 2, {})])
def test_whole_blocks_are_chosen(text, folder, method, block, options):
    found, model, sequence = lists(method, text, folder, **options)
    total = -(-sequence.length // PAGE)
    last = (total - 3) // block * block
    for layer, head in every(model):
        pages = found[layer][head]
        assert {*range(block), *range(last, total)} <= set(pages) and len(pages) <= 16
        for b in range(1, last // block):
            assert len(set(pages) & {*range(b * block, (b + 1) * block)}) in (0, block)
    if method == "infllm":
        assert all(heads[0] == heads[1] for heads in found)


def test_a_block_is_known_by_the_keys_least_like_its_others():
    rng = np.random.default_rng(2)
    keys = (np.ones(DEPTH) + 0.1 * rng.standard_normal((128, DEPTH))).astype(np.float32)
    keys[[3, 40, 41, 127]] = rng.standard_normal((4, DEPTH))
    np.testing.assert_allclose(representative(keys), keys[[3, 40, 41, 127]].mean(0), atol=1e-3)


def test_landmark_goes_by_the_last_key_of_each_block(text, folder):
    found, model, sequence = lists("landmark", text, folder)
    for layer, head in every(model):
        keys, queries = keys_and_queries(model, sequence, text, layer, head)
        blocks = np.arange(1, (47 - 3) // 2)
        best = blocks[np.argsort(-(queries @ keys[64 * blocks + 63].T).max(0), kind="stable")[:(16 - 2 - 3) // 2]]
        assert {page // 2 for page in found[layer][head] if 2 <= page < 44} == set(best.tolist())


@pytest.mark.parametrize("period, about", [(64, {}), (64, {"landmark_period": 50}), (128, {"landmark_period": 64})])
def test_landmark_refuses_other_checkpoints(period, about):
    with pytest.raises(ValueError, match="landmark_period"):
        load_policy("decode", "landmark", {"period": period}).load("folder", {"model": about})


def test_landmark_needs_a_model_that_says_so(nano_int4, tmp_path):
    shutil.copytree(nano_int4, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="no landmark_period"):
        Model.load(tmp_path, sparse=SparseOptions("landmark", {}, 0))
    config = json.loads((nano_int4 / "edgeattn.json").read_text())
    config["model"]["landmark_period"] = 64
    (tmp_path / "edgeattn.json").unlink()
    (tmp_path / "edgeattn.json").write_text(json.dumps(config))
    model = Model.load(tmp_path, sparse=SparseOptions("landmark", {"budget": 256}, 0))
    sequence = model.new_sequence()
    model.forward([(sequence, np.arange(1000) % 500)])
    assert np.isfinite(model.forward([(sequence, [5])])).all() and model.scheduler.figures()["sparse"] > 0


@pytest.mark.parametrize("cache", [F16, INT4], ids=["f16", "int4"])
def test_loki_with_all_components_takes_the_pages_of_the_best_tokens(text, folder, cache):
    found, model, sequence = lists("loki", text, folder, cache, rank=DEPTH, fraction=0)
    total = -(-sequence.length // PAGE)
    for layer, head in every(model):
        keys, queries = keys_and_queries(model, sequence, text, layer, head)
        last = total - 3 if cache is F16 else int(sequence.sealed[layer, head])
        best = (keys[:last * PAGE] @ queries.sum(0)).reshape(last, PAGE).max(1)[1:]
        chosen, count = found[layer][head][1:-(total - last)], 16 - 1 - (total - last)
        assert len(chosen) == count and best[np.array(chosen) - 1].min() > np.sort(best)[-count] - 2e-3 * np.abs(best).max()  # halves


def test_loki_scores_by_the_first_components(text, folder):
    found, model, sequence = lists("loki", text, folder, fraction=0)
    components, total = load_components(folder, CONFIG)[..., :DEPTH // 4, :], -(-sequence.length // PAGE)
    for layer, head in every(model):
        keys, queries = keys_and_queries(model, sequence, text, layer, head)
        e = components[layer, head].astype(np.float64)
        best = ((keys[:(total - 3) * PAGE] @ e.T) @ (e @ queries.sum(0))).reshape(-1, PAGE).max(1)[1:]
        chosen = {page for page in found[layer][head] if 1 <= page < total - 3}
        assert len(chosen & set((1 + np.argsort(-best)[:12]).tolist())) >= 11  # keys are rounded to halves


def test_magic_pig_reads_what_collides_and_nothing_else(text, folder):
    model = SparseDriver("magic_pig", {"budget": 1400, "dense_layers": 0}, folder=folder)
    few, _, _ = lists("magic_pig", text, folder, budget=1400, tables=2)
    many, _, sequence = lists("magic_pig", text, folder, budget=1400, tables=64, bits=2)
    assert max(len(pages) for heads in few for pages in heads) < 44 == min(len(pages) for heads in many for pages in heads)
    planes, found = model.scheduler.components, lists("magic_pig", text, folder, budget=1400)
    for layer, head in every(model):
        keys, queries = keys_and_queries(found[1], found[2], text, layer, head)
        centre = keys[PAGE:5 * PAGE].mean(0)
        shared = sum((((keys[:44 * PAGE] - centre) @ p.T > 0)[:, None] == (queries @ p.T > 0)).all(-1).astype(int) for p in planes)
        score = np.where(shared >= 2, shared, 0).sum(1).reshape(44, PAGE).sum(1)
        assert {page for page in found[0][layer][head] if 1 <= page < 44} == {*np.flatnonzero(score[1:] > 0) + 1}


def test_index_of_magic_pig_takes_512_bytes_a_page(folder):
    model = SparseDriver("magic_pig", {"dense_layers": 0}, folder=folder)
    assert 2 * model.cache.new_sequence().index.shape[-1] == 512


def test_loki_index_is_as_large_as_keys_of_four_bits(folder):
    model = SparseDriver("loki", {"dense_layers": 0}, folder=folder)
    assert 2 * model.cache.new_sequence().index.shape[-1] == PAGE * DEPTH // 2


@pytest.mark.parametrize("method, options", [("hisa", {"blocks": 1}), ("loki", {"rank": -1}), ("magic_pig", {"bits": 9}),
                                             ("magic_pig", {"tables": 1}), ("landmark", {"period": 50})])
def test_options_out_of_range(method, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        load_policy("decode", method, options)


# ---- principal components ------------------------------------------------------------------------------------------
def test_components_of_a_model(nano_int4, tmp_path):
    model = Model.load(nano_int4, cache=F16, ctx_size=512)
    prompts = [np.random.default_rng(i).integers(0, model.vocab_size, 150) for i in range(2)]
    found, shape = measure_components(model, prompts), model.cache.shape
    depth = model.cache.head_dim
    assert found.shape == (*shape, depth, depth) and found.dtype == np.float32
    np.testing.assert_allclose(found @ found.swapaxes(-1, -2), np.broadcast_to(np.eye(depth), found.shape), atol=1e-5)
    keys = []
    for ids in prompts:
        sequence = model.new_sequence()
        model.forward([(sequence, ids)])
        keys.append(model.cache.read(sequence, 1, 0)[0])
    along = (np.concatenate(keys) @ found[1, 0].T).astype(np.float64)
    moments = along.T @ along
    assert (np.diff(moments.diagonal()) <= 1e-3 * moments[0, 0]).all()  # most important first, none mixed with another
    assert np.abs(moments - np.diag(moments.diagonal())).max() < 1e-4 * moments[0, 0]
    shutil.copytree(nano_int4, tmp_path, dirs_exist_ok=True)
    save_components(tmp_path, model.config, found, 300)
    np.testing.assert_array_equal(load_components(tmp_path, model.config), found)
    sparse = Model.load(tmp_path, ctx_size=1024, sparse=SparseOptions("loki", {"budget": 128, "fraction": 0}, 0))
    sequence = sparse.new_sequence()
    sparse.forward([(sequence, np.arange(600) % 500)])
    assert np.isfinite(sparse.forward([(sequence, [5])])).all() and sparse.scheduler.figures()["sparse"] > 0


def test_components_need_exact_keys(nano_int4):
    with pytest.raises(ValueError, match="exact keys"):
        measure_components(Model.load(nano_int4, cache=INT4, ctx_size=256), [[1, 2, 3]])


@pytest.mark.parametrize("damage", ["none", "shape", "skew", "nan"])
def test_components_that_are_no_basis(tmp_path, damage):
    good = np.tile(np.eye(DEPTH, dtype=np.float32), (LAYERS, KV_HEADS, 1, 1))
    if damage != "none":
        bad = {"shape": good[1:], "skew": good + np.float32(0.01), "nan": np.where(good, np.nan, good)}[damage]
        save_components(tmp_path, CONFIG, bad, 0)
    with pytest.raises(ValueError, match="edgeattn calibrate") as error:
        load_policy("decode", "loki").load(tmp_path, CONFIG)
    assert "\n" not in str(error.value)


def test_rows_are_made_anew_on_a_gpu_too_when_pages_are_first_sealed(monkeypatch, nano_int4):
    """Until then pages of floats have rows; what quantised pages give back are other keys."""
    turns = np.linalg.qr(np.random.default_rng().standard_normal((8, 2, 64, 64)))[0].astype(np.float32)
    monkeypatch.setattr("edgeattn.principal_components.load_components", lambda folder, config: turns)
    ids, found = np.random.default_rng().integers(4, 8000, 280), []
    for make in (devices.make_backend, lambda name: make_backend(monkeypatch)):
        monkeypatch.setattr("edgeattn.runtime.make_backend", make)
        model = Model.load(nano_int4, cache=CacheOptions("int2", "int2"), ctx_size=512, threads=1, prefill=PrefillOptions("off"),
                           sparse=SparseOptions("loki", {"budget": 64, "fraction": 0.6, "recent": 2, "dense_layers": 0}, 0))
        a = model.new_sequence()
        model.forward([(a, ids[:110])], "none")
        got = [model.forward([(a, ids[i:i + 1])]) for i in range(110, 120)]
        assert (a.sealed == 1).all() and model.scheduler.figures()["read"] < 1
        got += [model.forward([(a, ids[i:i + 1])]) for i in range(120, 280)]
        assert (a.sealed == 6).all() and model.scheduler.figures()["read"] < 1
        found.append(got)
    for expected, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)
