"""Sessions on disk: they continue bit for bit, survive a killed save, and a file that is not whole is refused and left alone."""
import mmap
import os
import random
import resource
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgeattn.cache import session
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.cache.pages import CacheFull
from edgeattn.cache.session_file import NO_SUM, SessionError, check, read_metadata, write
from edgeattn.kernels_cpu.page_pool import RELEASED
from edgeattn.runtime import Model

BUDGET = 1200 << 10
CACHES = {
    "f16": CacheOptions("f16", "f16"),
    "int4": CacheOptions("int4", "int4"),
    "mixed": CacheOptions("int8", "int3", window=32),
    "hadamard": CacheOptions("int4", "int4", storage="hadamard"),
    "zipcache": CacheOptions("int4", "int4", storage="zipcache", window=32),
    "akvq": CacheOptions("int2", "int2", storage="akvq"),
    "delta": CacheOptions("delta", "int4", storage="delta", window=32),
    "progressive": CacheOptions("int8", "int8", progressive=0.1),
    "evicting": CacheOptions("f16", "f16", budget=2 << 20),
    "evicting_int4": CacheOptions("int4", "int4", budget=BUDGET, eviction="h2o"),
    "streaming_int4": CacheOptions("int4", "int4", budget=BUDGET, eviction="streaming_llm"),
}


def load_model(folder, options):
    return Model.load(folder, cache=options, ctx_size=2048, ubatch=128, threads=1)


def decode(model, sequence, count, first=5):
    """Logits of `count` greedy steps, of a chunk behind them, and of one step more."""
    found, token = [], first
    for _ in range(count):
        found.append(model.forward([(sequence, [token])])[0])
        token = int(found[-1].argmax())
    chunk = np.random.default_rng(8).integers(3, model.vocab_size, 70)
    return [*found, *model.forward([(sequence, chunk)], "all"), *model.forward([(sequence, [token])])]


@pytest.mark.parametrize("name", CACHES)
def test_restored_sequence_continues_bit_for_bit(name, nano_int4, tmp_path):
    model, path = load_model(nano_int4, CACHES[name]), tmp_path / "session"
    sequence, ids = model.new_sequence(), np.random.default_rng(1).integers(3, model.vocab_size, 450)
    model.forward([(sequence, ids)])
    known = [*ids.tolist(), *range(3, 43)]
    for token in known[450:]:
        model.forward([(sequence, [token])])
    if model.cache.plan.evicts:
        assert sequence.counts.min() < sequence.length
    assert (sequence.sealed.max() > 1) == CACHES[name].quantised
    session.save(path, model.cache, sequence, known, model.config, {"any": [1, "\ud800"]})
    state, pages = sequence.copy(), [model.cache.read(sequence, 3, 1), model.cache.read(sequence, 0, 0)]
    state.tables = sequence.tables != RELEASED
    expected = decode(model, sequence, 40)
    model.free(sequence)
    decode(model, other := model.new_sequence(), 20)  # leaves something else in the pages
    model.free(other)
    for again in (model, load_model(nano_int4, CACHES[name])):
        restored, token_ids, meta = session.load(path, again.cache, again.config)
        assert token_ids == known and meta == {"any": [1, "\ud800"]}
        assert (restored.length, restored.exact_from, restored.room) == (state.length, state.exact_from, state.room)
        np.testing.assert_array_equal(restored.tables != RELEASED, state.tables)
        for part in ("counts", "sealed"):
            np.testing.assert_array_equal(getattr(restored, part), getattr(state, part))
        for (k, v), head in zip(pages, ((3, 1), (0, 0))):
            again_k, again_v = again.cache.read(restored, *head)
            assert np.array_equal(again_k, k) and np.array_equal(again_v, v)
        for step, (a, b) in enumerate(zip(decode(again, restored, 40), expected, strict=True)):
            np.testing.assert_array_equal(a, b, err_msg=f"step {step}")
        again.free(restored)
        assert all(pool.used == 0 for pool in again.cache.pools)


def test_a_session_holds_no_more_than_its_tokens_pages(nano_int4, tmp_path):
    model, path = load_model(nano_int4, CACHES["int4"]), tmp_path / "session"
    sequence = model.new_sequence()
    model.forward([(sequence, ids := list(range(3, 303)))])
    session.save(path, model.cache, sequence, ids, model.config, {})
    assert path.stat().st_size < model.cache.stored_bytes(sequence) * 1.05 + 8192
    tensors = load_file(path)  # any safetensors reader reads it
    assert tensors["token_ids"].tolist() == ids and len(tensors["pages.1.k"]) == (tensors["kinds"] == 1).sum() > 0
    assert path.stat().st_mode & 0o777 == 0o600


# ---- a cache without a model -----------------------------------------------------------------------------------------
def small(options=CacheOptions("int4", "int4", window=32), tokens=512):
    return KVCache(layers=2, kv_heads=2, head_dim=32, tokens=tokens, options=options, ubatch=128)


def filled(cache, count, seed=0):
    """A sequence with random pages."""
    rng, sequence = np.random.default_rng(seed), cache.new_sequence()
    for start in range(0, count, cache.plan.chunk):
        new = min(cache.plan.chunk, count - start)
        cache.append(sequence, new)
        for entry in sequence.tables[sequence.tables >= 0]:
            if entry % 4 == 0:
                for array in (cache.pools[0].pages.k, cache.pools[0].pages.v):
                    array[entry // 4].view(np.float16)[:] = rng.standard_normal(array.shape[1] // 2)
        cache.settle(sequence, new)
    return sequence


@pytest.fixture
def saved(tmp_path):
    """(path, cache) of a session of 300 tokens."""
    cache, path = small(), tmp_path / "saved.session"
    session.save(path, cache, filled(cache, 300), list(range(300)), {"precision": "int4"}, {"messages": []})
    return path, cache


def refusal(path, cache, config=None, error=SessionError):
    """Why a file is refused; nothing has changed then."""
    before, used = path.read_bytes(), [pool.used for pool in cache.pools]
    with pytest.raises(error) as caught:
        session.load(path, cache, {"precision": "int4"} if config is None else config)
    assert path.read_bytes() == before and [pool.used for pool in cache.pools] == used and "\n" not in str(caught.value)
    return str(caught.value)


def test_any_damage_is_noticed(saved):
    path, cache = saved
    good, rng = path.read_bytes(), random.Random(1)
    session.load(path, cache, {"precision": "int4"})
    places = [0, 7, 8, 9, *(rng.randrange(len(good)) for _ in range(60)), *(rng.randrange(2000) for _ in range(60)), len(good) - 1]
    for place in places:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1:])
        assert refusal(path, cache)
    for damaged in (*(good[:place] for place in places), good + b"x", b"", b"\0" * 5000, b"{" * 100_000):
        path.write_bytes(damaged)
        assert refusal(path, cache)
    path.write_bytes((200_000).to_bytes(8, "little") + b"[" * 200_000)
    assert "not a session" in refusal(path, cache)


def forge(path, change, **metadata):
    """Change tensors and metadata of a session and put its checksum right."""
    tensors, known = load_file(path), read_metadata(path) | metadata
    changed = change(tensors) or tensors
    with open(path, "wb") as file:
        write(file, known | {"checksum": NO_SUM}, {name: (array, None) for name, array in changed.items()})


def put(name, where, value):
    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][where] = value
    return change


FORGERIES = {
    "pool that is none": put("kinds", 0, 3),
    "quantised first page": put("kinds", 0, 1),
    "floats where codes are": put("kinds", 1, 0),
    "codes where the next token is written": lambda t: t.update(sealed=t["sealed"] + 7),
    "no page sealed": put("sealed", (0, 0), 0),
    "negative count": put("counts", (0, 0), -1),
    "other count": put("counts", (1, 1), 200),
    "too many slots": lambda t: t.update(counts=t["counts"] + 2**20),
    "wrong type": lambda t: t.update(counts=t["counts"].astype(np.float32)),
    "another shape": lambda t: t.update(counts=t["counts"].reshape(1, 4)),
    "a page too few": lambda t: t.update({"pages.1.k": t["pages.1.k"][1:]}),
    "narrow pages": lambda t: t.update({"pages.0.v": t["pages.0.v"][:, 1:].copy()}),
    "missing pages": lambda t: {name: array for name, array in t.items() if name != "pages.1.k_params"},
    "missing list": lambda t: {name: array for name, array in t.items() if name != "kinds"},
    "too few tokens": lambda t: t.update(token_ids=t["token_ids"][:-1]),
    "impossible token": put("token_ids", 3, -5),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_reaches_no_page(name, saved):
    path, cache = saved
    forge(path, lambda tensors: None)
    session.load(path, cache, {"precision": "int4"})
    forge(path, FORGERIES[name])
    check(path)
    assert "damaged" in refusal(path, cache)


@pytest.mark.parametrize("metadata, message", [
    ({"tokens": "301"}, "impossible counts"), ({"tokens": "-1"}, "impossible"), ({"tokens": "9" * 5000}, "impossible"),
    ({"tokens": "10"}, "impossible"), ({"exact_from": "400"}, "impossible lengths"), ({"meta": "["}, "no valid meta"),
    ({"meta": "[" * 100_000}, "no valid meta"), ({"settings": "7"}, "no valid settings"), ({"version": "2"}, "format 2"),
    ({"format": "other"}, "not a session"), ({"model": "x"}, "another model (unknown int4)")])
def test_metadata_is_checked(metadata, message, saved):
    path, cache = saved
    forge(path, lambda tensors: None, **metadata)
    assert message in refusal(path, cache)


def test_tokens_that_the_model_does_not_know(saved):
    """A sampler looks them up among the logits, for the repeat penalty."""
    path, cache = saved
    config = {"model": {"vocab_size": 299}}
    session.save(path, cache, filled(cache, 300), list(range(300)), config, {})
    assert "impossible tokens" in refusal(path, cache, config)


def test_another_cache_is_named(saved):
    path, cache = saved
    for other, message in ((small(CacheOptions("f16", "f16")), "k_type int4 (here f16), v_type int4 (here f16)"),
                           (small(CacheOptions("int4", "int4", storage="hadamard", window=32)), "storage kivi (here hadamard)"),
                           (small(CacheOptions("int4", "int4", window=64)), "window 32 (here 64)"),
                           (small(CacheOptions("int4", "int4", window=32, budget=200_000)), "eviction none (here "),
                           (KVCache(2, 4, 32, 512, CacheOptions("int4", "int4", window=32)), "shape 2 layers of 2 KV heads")):
        assert f"made with another KV cache: {message}" in refusal(path, other)
    limited = [small(CacheOptions("int4", "int4", window=32, budget=budget, eviction="streaming_llm")) for budget in (140_000, 170_000)]
    session.save(path, limited[0], filled(limited[0], 300), [1] * 300, {"precision": "int4"}, {})
    assert "limits" in refusal(path, limited[1])
    session.load(path, limited[0], {"precision": "int4"})
    wide = small(tokens=1024)  # nothing is evicted: a larger context is no other cache
    session.save(path, cache, filled(cache, 100), [1] * 100, {}, {})
    assert session.load(path, wide, {})[0].length == 100


def test_no_room_is_said(saved):
    path, cache = saved
    assert "300 tokens and the context here 256" in refusal(path, small(tokens=256), error=CacheFull)
    full = small(CacheOptions("f16", "f16"), 320)
    sequence = filled(full, 300)
    session.save(path, full, sequence, [1] * 300, {}, {})
    assert "pages" in refusal(path, full, {}, error=CacheFull)
    full.truncate(sequence, 0)
    session.load(path, full, {})


# ---- saving --------------------------------------------------------------------------------------------------------
def test_a_killed_save_leaves_one_state_or_the_other(tmp_path):
    cache, path, rng = small(CacheOptions("f16", "f16"), 2048), tmp_path / "x.session", random.Random(2)
    sequences = [filled(cache, count, count) for count in (400, 700)]
    started = time.perf_counter()
    session.save(path, cache, sequences[0], [0] * 400, {}, {"n": 0})
    once = time.perf_counter() - started
    done = mmap.mmap(-1, 8)  # saves that returned, told by the child
    for _ in range(20):
        start = int.from_bytes(done[:], "little")
        child = os.fork()
        if not child:
            for n in range(start + 1, start + 100_000):
                session.save(path, cache, sequences[n % 2], [n] * sequences[n % 2].length, {}, {"n": n})
                done[:] = n.to_bytes(8, "little")
            os._exit(0)
        time.sleep(rng.uniform(0, 4 * once))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        finished = int.from_bytes(done[:], "little")
        restored, token_ids, meta = session.load(path, cache, {})
        n = meta["n"]
        assert finished <= n <= finished + 1 and token_ids == [n] * sequences[n % 2].length
        for a, b in zip(cache.read(restored, 1, 1), cache.read(sequences[n % 2], 1, 1)):
            np.testing.assert_array_equal(a, b)
        done[:] = n.to_bytes(8, "little")
        cache.truncate(restored, 0)
    session.save(path, cache, sequences[0], [0] * 400, {}, {})
    assert os.listdir(tmp_path) == ["x.session"]  # what the killed ones left is gone


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, cache = saved
    before, sequence = path.read_bytes(), filled(cache, 64)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # as good as a full disk
    try:
        with pytest.raises(OSError):
            session.save(path, cache, sequence, [1] * 64, {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                session.save(path, cache, sequence, [1] * 64, {}, {})
    with pytest.raises(ValueError, match="token ids"):
        session.save(path, cache, sequence, [1] * 63, {}, {})
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_links_and_modes_stay(saved):
    path, cache = saved
    path.chmod(0o640)
    link = path.with_name("link")
    link.symlink_to(path)
    session.save(link, cache, filled(cache, 64), [1] * 64, {}, {})
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o640 and session.load(path, cache, {})[0].length == 64
