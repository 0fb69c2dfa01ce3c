"""Pages that are released and computed again: the same keys and values, within the budget, and those that a prompt asks for."""
import numpy as np
import pytest
import tiny

from edgeattn.cache import session
from edgeattn.cache.options import CacheOptions, RELEASING
from edgeattn.cache.release import candidates, release, released, resident
from edgeattn.exporters import check
from edgeattn.exporters.export import export
from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy
from edgeattn.rebuild import rebuild, recall
from edgeattn.runtime import Model
from test_kv_budget import peak_of


@pytest.fixture(scope="module")
def tiny_export(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.save_tiny("qwen3", path / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_runtime_logits", check._onnxruntime_logits)
        export(path / "checkpoint", path / "out", "fp32", 16)
    return path / "out"


@pytest.fixture(params=["tiny", "nano"])
def folder(request, tiny_export, nano_fp32):
    return tiny_export if request.param == "tiny" else nano_fp32


def load(folder, kind="f32", ubatch=128, **options):
    k_type = load_policy("storage", options.get("storage", "kivi")).keys or kind
    return Model.load(folder, cache=CacheOptions(k_type, kind, **options), ctx_size=256 if not options.get("budget") else 2048,
                      ubatch=ubatch, threads=1)


def tokens(model, count, seed=3):
    return np.random.default_rng(seed).integers(3, model.vocab_size, count)


def contents(model, sequence):
    return np.array([model.cache.read(sequence, layer, head) for layer, head in np.ndindex(model.cache.shape)])


def put_back(model, sequence, ids, pages):
    for page in pages:
        rebuild(model, sequence, page, ids[PAGE * page:PAGE * (page + 1)])


@pytest.mark.parametrize("ubatch, pages", [(128, [3]), (20, [0, 1, 4]), (128, [0, 1, 2, 3, 4, 5])])
def test_rebuilt_pages_hold_what_the_first_ones_did(folder, ubatch, pages):
    model = load(folder, ubatch=ubatch)
    sequence, ids = model.new_sequence(), tokens(model, 200)
    model.forward([(sequence, ids)])
    before, used = contents(model, sequence), model.cache.pools[0].used
    probe = model.fork(sequence)
    expected = model.forward([(probe, [5])])
    model.free(probe)
    means = [release(model.cache, sequence, page) for page in pages]
    assert released(sequence).tolist() == pages and resident(sequence) == 200 - PAGE * len(pages)
    assert model.cache.pools[0].used == used - len(pages) * np.prod(model.cache.shape)
    for page, mean in zip(pages, means):
        keys = before[:, 0, PAGE * page:PAGE * (page + 1)].mean(1).reshape(mean.shape)
        np.testing.assert_allclose(mean, keys, rtol=1e-3, atol=1e-3)
    probe = model.fork(sequence)
    without = model.forward([(probe, [5])])
    assert np.isfinite(without).all() and np.abs(without - expected).max() > 1e-3
    model.free(probe)
    put_back(model, sequence, ids, pages)
    assert not len(released(sequence)) and model.cache.pools[0].used == used
    np.testing.assert_allclose(contents(model, sequence), before, rtol=0, atol=1e-5 * max(1, np.abs(before).max()))
    np.testing.assert_allclose(model.forward([(sequence, [5])]), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind, storage", [("int8", "kivi"), ("int4", "hadamard"), ("int4", "delta")])
def test_quantised_pages_are_quantised_again(kind, storage, nano_int4):
    model = load(nano_int4, kind, storage=storage, window=32)
    sequence, ids = model.new_sequence(), tokens(model, 240)
    model.forward([(sequence, ids)])
    before, used = contents(model, sequence), [pool.used for pool in model.cache.pools]
    assert sequence.sealed.min() == 6
    for page in (0, 2, 3, 6):  # floats, quantised ones, floats
        release(model.cache, sequence, page)
    model.forward([(sequence, tokens(model, 10))])  # the float page that has gone is passed over by sealing
    put_back(model, sequence, ids, (0, 2, 3, 6))
    model.truncate(sequence, 240)
    kinds = sequence.tables[:, :, :8] % POOLS
    assert (kinds[..., [0, 6, 7]] == 0).all() and (kinds[..., 1:6] == 1).all() and used == [pool.used for pool in model.cache.pools]
    error = np.abs(contents(model, sequence) - before)
    assert error.mean() < (0.02 if kind == "int8" else 0.2) * np.abs(before).mean()


def test_sealing_passes_over_released_pages(nano_int4):
    model = load(nano_int4, "int4", window=64)
    sequence, ids = model.new_sequence(), tokens(model, 256)
    model.forward([(sequence, ids[:160])])
    release(model.cache, sequence, 3)
    model.forward([(sequence, ids[160:])])
    assert sequence.sealed.min() == 6 and released(sequence).tolist() == [3]
    put_back(model, sequence, ids, [3])
    assert (sequence.tables[:, :, 1:6] % POOLS == 1).all()


def test_what_cannot_be_released_or_rebuilt(tiny_export, nano_int4, tmp_path):
    model = load(tiny_export)
    sequence, ids = model.new_sequence(), tokens(model, 100)
    model.forward([(sequence, ids)])
    for page in (-1, 3, 4):
        with pytest.raises(ValueError, match="full"):
            release(model.cache, sequence, page)
    with pytest.raises(ValueError, match="not released"):
        rebuild(model, sequence, 1, ids[32:64])
    release(model.cache, sequence, 1)
    with pytest.raises(ValueError, match="not released yet"):
        release(model.cache, sequence, 1)
    with pytest.raises(ValueError, match="32 tokens"):
        rebuild(model, sequence, 1, ids[32:60])
    with pytest.raises(ValueError, match="cannot be saved"):
        session.save(tmp_path / "session", model.cache, sequence, ids.tolist(), {}, {})
    sorts = load(nano_int4, "int4", storage="akvq", window=32)
    a = sorts.new_sequence()
    sorts.forward([(a, tokens(sorts, 250))])
    with pytest.raises(ValueError, match="evicted or sorted"):
        for page in range(4):
            release(sorts.cache, a, page)
    evicts = load(nano_int4, "f16", budget=3 << 20, eviction="h2o")
    a = evicts.new_sequence()
    evicts.forward([(a, tokens(evicts, 1500))])
    with pytest.raises(ValueError, match="evicted or sorted"):
        release(evicts.cache, a, 1)


def test_a_cut_through_a_released_page_takes_it_whole(tiny_export):
    model = load(tiny_export)
    a, ids = model.new_sequence(), tokens(model, 150)
    model.forward([(a, ids)])
    release(model.cache, a, 2)
    b = model.fork(a)
    assert model.truncate(a, 70) == 64 and model.truncate(b, 110) == 110 and released(b).tolist() == [2]
    fresh = load(tiny_export)
    expected = fresh.forward([(fresh.new_sequence(), ids[:90])])
    np.testing.assert_allclose(model.forward([(a, ids[64:90])]), expected, atol=2e-4)
    put_back(model, b, ids, [2])
    assert released(b).tolist() == []
    model.free(a), model.free(b)
    assert model.cache.pools[0].used == 0


def test_forks_keep_their_pages(tiny_export):
    model = load(tiny_export)
    a, ids = model.new_sequence(), tokens(model, 100)
    model.forward([(a, ids)])
    b, before = model.fork(a), contents(model, a)
    release(model.cache, b, 1)
    np.testing.assert_array_equal(contents(model, a), before)
    put_back(model, b, ids, [1])
    np.testing.assert_array_equal(contents(model, a), before)
    assert (a.tables[:, :, 1] != b.tables[:, :, 1]).all()


# ---- the policy ------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["f16", "int4"])
def small(request, nano_int4):
    """A model whose budget holds a few hundred tokens."""
    model = load(nano_int4, request.param, ubatch=64, budget=5 << 19 if request.param == "f16" else 3 << 19, eviction=RELEASING)
    assert 128 <= model.cache.plan.limits.min() < 700
    return model


def test_a_budget_is_kept_and_pages_come_back(small, monkeypatch):
    model, cache = small, small.cache
    sequence, limit = model.new_sequence(), int(cache.plan.limits.min())
    assert cache.total_bytes <= cache.options.budget and cache.plan.state_bytes() >= sequence.nbytes
    prompt, question = tokens(model, limit + 300), tokens(model, 40, seed=4)

    def check():
        assert limit - 2 * PAGE <= resident(sequence) < limit + PAGE and (sequence.counts == sequence.length).all()
        gone = (sequence.tables[:, :, :-(-sequence.length // PAGE)] == RELEASED)
        newest = (sequence.length - cache.options.window) // PAGE
        assert (gone == gone[:1, :1]).all() and not gone[..., 0].any() and not gone[..., newest:].any()
    with peak_of(cache, [sequence]) as peak:
        logits = model.forward([(sequence, prompt)])
        check()
        assert len(released(sequence)) >= 8 and not sequence.pinned.any()
        for _ in range(40):
            logits = model.forward([(sequence, [int(logits.argmax())])])
        check()
        gone = released(sequence)
        monkeypatch.setattr(type(cache.eviction), "interest", lambda self, means, query: -np.arange(len(means), dtype=np.float32))
        model.forward([(sequence, question)])  # the lowest pages are asked for
        check()
        assert np.flatnonzero(sequence.pinned).tolist() == gone[:4].tolist() and not np.isin(gone[:4], released(sequence)).any()
        model.forward([(sequence, question)])  # the same prompt still: nothing is decoded in between
        assert np.flatnonzero(sequence.pinned).tolist() == gone[:4].tolist()
        ids = np.concatenate([prompt, sequence.token_ids[len(prompt):len(prompt) + 40], question, question])
        np.testing.assert_array_equal(sequence.token_ids[:sequence.length], ids)
        check()
        left = model.truncate(sequence, limit - 40)
        model.forward([(sequence, question[:8])])
        assert not len(released(sequence)) and sequence.length == left + 8  # all that there is room for
    assert peak[0] <= cache.options.budget
    for pool in cache.pools:
        assert pool.references.max() <= 1
    model.free(sequence)
    assert not any(pool.used for pool in cache.pools)


@pytest.mark.parametrize("kind", ["f32", "int4"])
def test_a_prompt_behind_released_pages_takes_nothing_of_what_lay_in_memory(tiny_export, kind):
    model = load(tiny_export, kind)
    sequence = model.new_sequence()
    model.forward([(sequence, tokens(model, 160))], "none")
    for page in (1, 2):
        release(model.cache, sequence, page)
    model.plan.workspace.fill(0xff)  # floats that are no numbers
    assert np.isfinite(model.forward([(sequence, tokens(model, 30, seed=4))], "all")).all()


def test_a_rebuilt_page_is_what_a_full_cache_holds(nano_int4):
    model = load(nano_int4, "f16", ubatch=64, budget=5 << 19, eviction=RELEASING)
    full = load(nano_int4, "f16", budget=64 << 20, eviction="none")
    ids = tokens(model, int(model.cache.plan.limits.min()) + 64)
    a, b = model.new_sequence(), full.new_sequence()
    model.forward([(a, ids)], "none"), full.forward([(b, ids)], "none")
    page = int(released(a)[0])  # nothing before it is missing
    model.cache.truncate(a, len(ids) - 40)
    rebuild(model, a, page, ids[PAGE * page:PAGE * (page + 1)])
    for layer, head in np.ndindex(model.cache.shape):
        got = model.cache.backend.read(model.cache.table, model.cache.head_dim, a.tables[layer, head, page:page + 1])
        expected = full.cache.backend.read(full.cache.table, full.cache.head_dim, b.tables[layer, head, page:page + 1])
        for x, y in zip(got, expected):
            np.testing.assert_allclose(x, y, rtol=0, atol=0.02 * np.abs(y).max())


def test_a_prompt_asks_for_pages_with_keys_like_its_own(small):
    model, cache, sequence = small, small.cache, small.new_sequence()
    ids = tokens(model, int(cache.plan.limits.min()) + 400)
    model.forward([(sequence, ids)], "none")
    gone = released(sequence)
    sequence.means[gone] = 0
    length, means = sequence.length, sequence.means
    recall(model, sequence, ids[:40])
    assert sequence.length == length and resident(sequence) <= cache.plan.limits.min() and len(released(sequence)) == len(gone)
    assert np.flatnonzero(sequence.pinned).tolist() == gone[:4].tolist()  # all alike: the oldest
    policy, query = load_policy("eviction", RELEASING), np.random.default_rng(1).standard_normal(means.shape[1:])
    found = policy.interest(np.stack([0 * query, query, -query, 0.5 * query]).astype(np.float16), query)
    assert found.argsort().tolist() == [2, 0, 3, 1] and found.dtype == np.float32
    assert len(candidates(cache, sequence)) >= 1


def test_options_that_do_not_go_together():
    for more in (dict(storage="zipcache"), dict(storage="akvq"), dict(heads="razor"), dict(layer_budget="zipvl")):
        with pytest.raises(ValueError, match=RELEASING):
            CacheOptions("int4", "int4", eviction=RELEASING, budget=1 << 24, **more)
    assert CacheOptions("int4", "int4", eviction=RELEASING, budget=1 << 24).releases
