"""Head classes: which KV heads stream, what they hold, what stands for the rest, and the file that says which they are."""
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgeattn import calibration
from edgeattn.cache.budget import choose_types
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.exporters.export import export
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy, policy_names
from edgeattn.runtime import Model, read_config
from kv_driver import Driver, dequantise
from tiny import save_tiny

CLASSES = np.array([[True, False], [False, False]])
METHODS = policy_names("heads")
DEPTH = 64


def a_cache(method="duo", kind="f16", tokens=2048, classes=CLASSES, ubatch=128, **options):
    return KVCache(2, 2, DEPTH, tokens, CacheOptions(kind, kind, heads="none" if classes is None else method, **options), ubatch, classes)


def held_positions(sequence, layer, head):
    return sequence.positions[layer, head, :sequence.counts[layer, head]]


# ---- what streaming heads hold -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, storage", [("f16", "kivi"), ("f32", "kivi"), ("int4", "kivi"), ("int2", "hadamard"), ("int4", "zipcache")])
@pytest.mark.parametrize("method", METHODS)
def test_streaming_heads_hold_the_first_page_and_recent_tokens(method, kind, storage):
    rng = np.random.default_rng()
    cache = a_cache(method, kind, storage=storage)
    driver, sequence = Driver(cache), cache.new_sequence()
    recent = load_policy("heads", method).recent(cache.tokens)
    for i, chunk in enumerate([*rng.integers(1, 128, 9), *[128] * 4, *[1] * 40, 60]):
        driver.forward([(sequence, driver.random(int(chunk)))], check=i in (11, 13, 53))  # against the reference, which is slow
    length = sequence.length
    for layer, head in np.ndindex(2, 2):
        positions = np.sort(held_positions(sequence, layer, head))  # zipcache sorts within groups of pages
        if CLASSES[layer, head]:
            np.testing.assert_array_equal(positions, np.arange(length))
            continue
        assert PAGE + recent <= len(positions) < PAGE + recent + 2 * PAGE
        np.testing.assert_array_equal(positions[:PAGE], np.arange(PAGE))
        if storage != "zipcache":
            np.testing.assert_array_equal(positions[PAGE:], np.arange(length - len(positions) + PAGE, length))
        assert np.isin(np.arange(length - 64, length), positions).all()
    cache.truncate(sequence, 0)
    assert not any(pool.used for pool in cache.pools) and (sequence.compensation is None or not sequence.compensation.any())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("length", [100, 700, 2000])
def test_bytes(method, length):
    """4 d (share L + (1 - share) (32 + recent)) bytes a head and f16 token, but for less than two pages."""
    cache, recent = a_cache(method), load_policy("heads", method).recent(2048)
    Driver(cache).fill(sequence := cache.new_sequence(), length, check=False)
    closed = 4 * DEPTH * (length + 3 * min(length, PAGE + recent))
    assert closed <= cache.used_bytes - sequence.nbytes < closed + 4 * 4 * DEPTH * 2 * PAGE


def test_forks_share_what_streams_on():
    cache = a_cache()
    driver, trunk = Driver(cache), cache.new_sequence()
    driver.fill(trunk, 480)
    before = cache.pools[0].used
    branch = cache.fork(trunk)
    tables = trunk.tables.copy()
    driver.fill(branch, 64, check=False)
    assert (branch.counts[~CLASSES] < 480).all() and cache.pools[0].used - before == 2 * 4  # 480 is whole pages: none is copied
    np.testing.assert_array_equal(trunk.tables, tables)
    driver.fill(trunk, 100)
    driver.fill(branch, 100)
    cache.truncate(trunk, 0)
    cache.truncate(branch, 0)
    assert not cache.pools[0].used and not cache.pools[0].references.any()


def test_many_sequences_share_the_context():
    """Where memory is not limited, each sequence has recent tokens of its own."""
    for kind in ("f16", "int4"):
        cache = a_cache(kind=kind, tokens=1024)
        driver, sequences = Driver(cache), [cache.new_sequence() for _ in range(4)]
        for sequence in sequences:
            driver.fill(sequence, 256, check=False)


# ---- what stands for the rest -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, storage", [("f32", "kivi"), ("f16", "kivi"), ("int4", "kivi"), ("int4", "hadamard")])
def test_compensation_is_the_mean_of_what_was_dropped(kind, storage):
    razor, dense = a_cache("razor", kind, ubatch=32, storage=storage), a_cache("razor", kind, classes=None, ubatch=32, storage=storage)
    drivers, sequences = [Driver(c) for c in (razor, dense)], [c.new_sequence() for c in (razor, dense)]
    for _ in range(30):
        parts = drivers[0].random(32)
        for driver, sequence in zip(drivers, sequences):
            driver.forward([(sequence, parts)], check=False)
    for layer, head in np.argwhere(~CLASSES):
        held, dropped = sequences[0].compensation[layer, head], np.ones(960, bool)
        dropped[held_positions(sequences[0], layer, head)] = False
        k, v = dequantise(dense, sequences[1], layer, head)
        assert held[0] == dropped.sum() > 400
        np.testing.assert_allclose(held[1:], np.r_[k[dropped].mean(0), v[dropped].mean(0)], atol=2e-5)
    assert not sequences[0].compensation[0, 0].any()


@pytest.mark.parametrize("kind", ["f32", "f16", "int4"])
def test_compensation_is_exact_for_equal_keys(kind):
    """Equal keys, any values: then the mean token is worth what all of its tokens were, in a chunk and in a decode step."""
    caches = a_cache("razor", kind, ubatch=32), a_cache(kind=kind, classes=None, ubatch=32)
    drivers, sequences = [Driver(c, rotary=False) for c in caches], [c.new_sequence() for c in caches]
    for count in [32] * 24 + [1]:
        q, k, v = drivers[0].random(count)
        k[:] = np.linspace(-2, 2, DEPTH, dtype=np.float32)
        a, b = (driver.forward([(sequence, (q, k, v))], check=False)[0] for driver, sequence in zip(drivers, sequences))
        np.testing.assert_allclose(a, b, atol=2e-3 if kind == "int4" else 2e-5)
    assert sequences[0].counts[1, 1] < sequences[1].counts[1, 1]


# ---- budgets and options -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method, kind", [("duo", "f16"), ("razor", "f16"), ("duo", "int4")])
def test_retrieval_heads_get_the_rest_of_a_budget(method, kind):
    about = dict(kind=kind, budget=900_000, eviction="none", tokens=4096, ubatch=64)
    cache, plain = a_cache(method, **about), a_cache(classes=None, **about)
    assert cache.total_bytes <= 900_000 and cache.capacity > 1.3 * plain.capacity
    driver, sequence = Driver(cache), cache.new_sequence()
    driver.fill(sequence, cache.capacity, check=False)
    assert cache.used_bytes + cache.plan.chunk_bytes() <= 900_000 and sequence.counts[0, 0] == cache.capacity


def test_eviction_is_for_retrieval_heads():
    cache = a_cache("razor", budget=600_000)
    driver, sequence = Driver(cache), cache.new_sequence()
    driver.fill(sequence, 1500, check=False)
    driver.fill(sequence, 1)
    assert cache.plan.limits[0, 0] - 2 * PAGE < sequence.counts[0, 0] <= cache.plan.limits[0, 0] < 1500
    assert not sequence.compensation[0, 0].any() and sequence.compensation[1, 1, 0] == 1501 - sequence.counts[1, 1]


def test_a_budget_with_streaming_heads_allows_wider_types():
    def chosen(classes):
        return choose_types(CacheOptions(budget=1_100_000, heads="duo"), "f16", 2, 2, DEPTH, 2048, 128, classes).name
    assert chosen(None) != "f16" and chosen(CLASSES) == "f16"


@pytest.mark.parametrize("given, word", [({"heads": "solo"}, "duo, razor"), ({"retrieval": 1.5}, "0 to 1")])
def test_wrong_options_are_named(given, word):
    with pytest.raises(ValueError, match=word):
        CacheOptions(**given)


def test_classes_are_the_best_share():
    scores = np.float32([[0.5, 0, 0], [0, 1, 0]])
    for share, expected in ((0, []), (0.01, [4]), (1 / 3, [0, 4]), (0.5, [0, 1, 4]), (5 / 6, [0, 1, 2, 3, 4])):
        assert np.flatnonzero(calibration.best(scores, share)).tolist() == expected


# ---- models ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny(tmp_path_factory, nano_checkpoint):
    """A tiny exported model with nano's tokenizer."""
    folder = tmp_path_factory.mktemp("heads")
    save_tiny("llama", folder / "checkpoint", vocab_size=8192, max_position_embeddings=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nano_checkpoint / name, folder / "checkpoint")
    export(folder / "checkpoint", folder / "model", precision="int8")
    return folder / "model"


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy that was not calibrated."""
    return shutil.copytree(tiny, tmp_path / "model")


def planted(folder, scores):
    calibration.save(folder / calibration.FILE, read_config(folder), {"head_scores": np.float32(scores)}, {"head_scores": {"seed": 3}})


def logits(folder, ids, options=None, **more):
    model = Model.load(folder, cache=options or CacheOptions("f16", "f16"), threads=1, **more)
    sequence = model.new_sequence()
    rows = [model.forward([(sequence, ids)], "all")]
    for token in ids[:3]:
        rows.append(model.forward([(sequence, [token])]))
    return np.concatenate(rows), sequence


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_all_retrieve_change_nothing(method, folder):
    ids = np.random.default_rng().integers(3, 8000, 700)
    np.testing.assert_array_equal(logits(folder, ids, CacheOptions("f16", "f16", heads=method, retrieval=1), ubatch=128)[0],
                                  logits(folder, ids, ubatch=128)[0])


@pytest.mark.parametrize("method", METHODS)
def test_texts_within_the_window_are_dense(method, folder):
    planted(folder, [[1, 0], [0, 2]])
    ids, options = np.random.default_rng().integers(3, 8000, 312), CacheOptions("f16", "f16", heads=method, retrieval=0.25)
    np.testing.assert_array_equal(logits(folder, ids, options, ubatch=64)[0], logits(folder, ids, ubatch=64)[0])
    found, sequence = logits(folder, np.tile(ids, 3), options, ubatch=64)
    assert (sequence.counts < 400).sum() == 3 and sequence.counts[1, 1] == 939 and np.isfinite(found).all()


def test_scores_are_losses_of_models_whose_head_streams(folder):
    """A branch of a prompt that was read in one chunk is what a model with that head streaming computes: it drops after the chunk."""
    rng = np.random.default_rng(5)
    prompts = [(rng.integers(3, 8000, 512).tolist(), [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])])]
    model = Model.load(folder, cache=CacheOptions("f16", "f16"), ubatch=512, threads=1)
    seen = []
    scores, base = calibration.score_heads(model, prompts, progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)] and scores.shape == (2, 2) and np.isfinite(scores).all() and not model.cache.pools[0].used
    again, _ = calibration.score_heads(model, prompts)
    np.testing.assert_array_equal(scores, again)
    for layer, head in np.ndindex(2, 2):
        planted(folder, 1 - np.eye(4)[2 * layer + head].reshape(2, 2))
        one = Model.load(folder, cache=CacheOptions("f16", "f16", heads="duo", retrieval=0.75), ubatch=512, threads=1)
        losses = []
        for ids, asks in prompts:
            for ask, answer in asks:
                one.forward([(sequence := one.new_sequence(), ids)], "none")
                assert sequence.counts[layer, head] == 288 and sequence.counts.sum() == 3 * 512 + 288
                rows = one.forward([(sequence, [*ask, *answer[:-1]])], "all")[len(ask) - 1:].astype(np.float64)
                losses.append(np.mean([np.log(np.exp(row - row[a]).sum()) for row, a in zip(rows, answer)]))
        assert scores[layer, head] == pytest.approx(np.mean(losses) - base, abs=1e-4)


def test_calibrate(edgeattn, folder):
    options = "calibrate", "-m", folder, "--lengths", "480", "--prompts", "1", "-s", "4", "-t", "1"
    assert "run edgeattn calibrate -m" in edgeattn.fails("generate", "-m", folder, "-p", "a", "-n", "1", "--kv-heads", "duo")
    first = edgeattn(*options)
    assert first.returncode == 0 and str(folder) in first.stdout and first.stdout.count("*") == 3  # two of four heads, and the key
    tensors, metadata = calibration.load(folder, read_config(folder))
    assert tensors["head_scores"].shape == (2, 2) and tensors["head_scores"].dtype == np.float32
    about = json.loads(metadata["head_scores"])
    assert about["seed"] == 4 and about["lengths"] == [480] and about["questions"] == 4
    assert edgeattn(*options).stdout == first.stdout and [p for p in folder.iterdir() if p.suffix == ".part"] == []
    done = edgeattn("generate", "-m", folder, "-p", "a", "-n", "1", "--kv-heads", "razor", "--kv-retrieval-heads", "0.25")
    assert done.returncode == 0
    assert "room for prompts of 896" in edgeattn.fails("calibrate", "-m", folder, "--lengths", "2048")
    assert "too short" in edgeattn.fails("calibrate", "-m", folder, "--lengths", "200")


# ---- the file ----------------------------------------------------------------------------------------------------------
def test_other_tensors_stay(folder):
    path, config = folder / calibration.FILE, read_config(folder)
    calibration.save(path, config, {"thresholds": np.arange(3.0)}, {"thresholds": {"method": "other"}})
    planted(folder, np.eye(2))
    planted(folder, CLASSES)
    tensors, metadata = calibration.load(folder, config)
    assert tensors["thresholds"].tolist() == [0, 1, 2] and json.loads(metadata["thresholds"]) == {"method": "other"}
    np.testing.assert_array_equal(calibration.head_classes(folder, config, 0.25), CLASSES)
    other = config | {"precision": "int2"}
    calibration.save(path, other, {"head_scores": np.eye(2)}, {})  # another model's tensors do not stay
    assert set(load_file(path)) == {"head_scores"}


def test_calibration_of_another_model_is_refused(folder):
    config, path = read_config(folder), folder / calibration.FILE
    with pytest.raises(ValueError, match=f"run edgeattn calibrate -m {folder}"):
        Model.load(folder, cache=CacheOptions(heads="duo"))
    planted(folder, np.eye(2))
    calibration.load(folder, config | {"verify": {"tokens": 1}})  # says nothing about the model
    with pytest.raises(ValueError, match="another model.* run edgeattn calibrate"):
        calibration.load(folder, config | {"files": {}})
    save_file({"head_scores": np.eye(2)}, path)
    with pytest.raises(ValueError, match="not a calibration"):
        calibration.load(folder, config)
    planted(folder, np.eye(3))
    with pytest.raises(ValueError, match="no usable head scores"):
        calibration.head_classes(folder, config, 0.5)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged.* run edgeattn calibrate"):
        calibration.head_classes(folder, config, 0.5)
