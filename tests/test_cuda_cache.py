"""Caches of a GPU that lose tokens by head or by page: the host's part, on an imitated GPU (imitated_gpu.py)."""
import numpy as np
import pytest
from test_cuda_host import QUEST, load, tokens  # noqa: F401  load is a fixture

from edgeattn import backend_cuda, runtime
from edgeattn.cache import session
from edgeattn.cache.release import released
from edgeattn.policies import policy_names


@pytest.mark.parametrize("heads", policy_names("heads"))
@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_heads_that_stream_hold_the_cpu_s_tokens(load, monkeypatch, tmp_path, cache, heads):  # noqa: F811
    """And what stands for those they drop, through forks, truncation and sessions."""
    monkeypatch.setattr(runtime, "head_classes", lambda folder, config, share: np.random.default_rng(0).random(
        (config["model"]["num_layers"], config["model"]["kv_heads"])) < share)
    ids, more, found = tokens(500), tokens(70), []
    for device in ("cpu", "cuda"):
        model = load(device, cache, heads=heads)
        a = model.new_sequence()
        got = [model.forward([(a, ids)], "all")]
        b = model.fork(a)
        got += [model.forward([(a, more[i:i + 1]), (b, more[i + 1:i + 2])]) for i in range(65)]
        session.save(tmp_path / device, model.cache, b, np.r_[ids, more].tolist(), model.config, {})
        c, _, _ = session.load(tmp_path / device, model.cache, model.config)
        got.append(model.forward([(a, more[:3]), (b, more[:1]), (c, more[:1])]))
        assert a.counts.min() < 330 < a.counts.max() == 568 and (heads == "duo") == (a.compensation is None)
        model.truncate(a, 0)
        found.append([*got, b.positions.copy(), model.forward([(a, more), (b, more[:50])])])
    for expected, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_pages_are_released_and_rebuilt_as_on_the_cpu(load, cache):  # noqa: F811
    """A prompt of several times the budget, answers, and prompts that ask for what is gone."""
    ids, more, found = tokens(700), tokens(70), []
    for device in ("cpu", "cuda"):
        model = load(device, cache, budget=2_600_000 if cache == "f16" else 1_200_000, eviction="adore")
        a = model.new_sequence()
        got = [model.forward([(a, ids)], "all")]
        assert 3 < len(released(a)) < 20
        got += [model.forward([(a, more[i:i + 1])]) for i in range(40)]
        gone = released(a)
        got += [model.forward([(a, ids[40:100])]), model.forward([(a, more[:1])])]
        assert set(gone) - set(released(a))
        a.fetch()
        found.append([*got, gone, released(a), a.means, a.mass * (np.arange(a.mass.shape[-1]) < a.length)])
    for expected, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("together", [1, 4, 100])
def test_means_of_pages_a_part_at_a_time(load, monkeypatch, together):  # noqa: F811
    model = load("cuda", "int4")
    backend, depth, a = model.backend, model.cache.head_dim, model.new_sequence()
    model.forward([(a, tokens(330))], "none")
    entries, made = a.tables[..., :10].ravel(), []
    k, v = backend.read(model.cache.table, depth, entries)
    monkeypatch.setattr(backend_cuda, "SCORING_BYTES", 8 * 32 * depth * together)
    monkeypatch.setattr(backend, "floats", lambda table, depth, part: made.append(len(part)) or backend.read(table, depth, part))
    found = backend.page_means(model.cache.table, depth, entries)
    np.testing.assert_array_equal(found, np.concatenate([k.mean(2), v.mean(1)], 1))
    assert max(made) == together and sum(made) == len(entries) == 160
    assert backend.page_means(model.cache.table, depth, entries[:0]).shape == (0, 2 * depth)


STORAGES = [("hadamard", "int4"), ("bitnet", "int3"), ("akvq", "int4"), ("zipcache", "int4"), ("delta", "delta/int4")]


@pytest.mark.parametrize("sparse", [None, QUEST], ids=["dense", "quest"])
@pytest.mark.parametrize("storage, cache", STORAGES)
def test_other_ways_to_quantise_are_the_cpu_s(load, tmp_path, storage, cache, sparse):  # noqa: F811
    """Two sequences whose pages seal, a fork, truncation, and a session that goes on with the other device."""
    ids, more, found, models = [tokens(500), tokens(77)], tokens(90), [], [load(d, cache, sparse, storage=storage) for d in ("cpu", "cuda")]
    for model in models:
        a, b = model.new_sequence(), model.new_sequence()
        got = [model.forward([(a, ids[0][:430]), (b, ids[1])], "all"), model.forward([(a, ids[0][430:])])]
        for i in range(40):
            got.append(model.forward([(a, more[i:i + 1]), (b, more[i + 1:i + 2])]))
        c = model.fork(a)
        got.append(model.forward([(a, more[:60]), (c, more[5:80]), (b, more[:1])]))
        got.append(model.forward([(a, more[:1]), (c, more[1:2])]))
        assert a.sealed.min() > 10
        session.save(tmp_path / model.backend.device, model.cache, c, np.r_[ids[0], more, more].tolist(), model.config, {})
        kept = model.truncate(a, 200)
        got.append(model.forward([(a, ids[0][kept:350])], "all"))
        got.append(model.forward([(c, more[:1])]))
        got += list(vars(model.cache.delta_figures(a)).values())
        model.free(b), model.free(c)
        found.append([*got, model.forward([(a, more[:70])])])
        model.free(a)
    for expected, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)
    restored = [session.load(tmp_path / other.backend.device, model.cache, model.config)[0] for model, other in zip(models, models[::-1])]
    for token in range(4, 74):
        np.testing.assert_array_equal(*(model.forward([(a, [token])]) for model, a in zip(models, restored)))


@pytest.mark.parametrize("storage, eviction", [("akvq", "h2o"), ("zipcache", "snapkv"), ("akvq", "key_diff")])
def test_tokens_that_were_sorted_are_dropped_as_on_the_cpu(load, storage, eviction):  # noqa: F811
    """By the attention that they received, before they were sorted and since."""
    ids, more, found = tokens(600), tokens(260), []
    for device in ("cpu", "cuda"):
        model = load(device, "int4", budget=2_000_000 if storage == "zipcache" else 1_500_000, eviction=eviction, storage=storage)
        a = model.new_sequence()
        got = [model.forward([(a, ids)]), *(model.forward([(a, more[i:i + 1])]) for i in range(260))]
        assert a.counts.max() < 860 and a.sealed.min() > 2
        a.fetch()
        found.append([*got, a.positions.copy(), a.mass * (np.arange(a.mass.shape[-1]) < a.counts[..., None])])
    for expected, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, expected)
