"""Sparse decode through the runtime: the scheduler, what it reads, and where it begins."""
import json
import shutil

import numba
import numpy as np
import pytest

from edgeattn import calibration, crossover
from edgeattn.cache import session
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu.page_pool import POOLS
from edgeattn.kernels_cpu.selections import AGE, COUNT, HEADER, INTERVAL, SLOTS
from edgeattn.page_formats import PAGE
from edgeattn.runtime import Model
from edgeattn.scheduler import ALL, NEVER, Scheduler, SparseOptions, even_shares

RNG = np.random.default_rng()
CACHES = {"int4": CacheOptions("int4", "int4"), "f16": CacheOptions("f16", "f16")}


def tokens(n):
    return RNG.integers(4, 8000, n)


def load(folder, cache="int4", method="quest", min_len=0, **options):
    options = {"budget": 256, "dense_layers": 0} | options if method == "quest" else options
    return Model.load(folder, cache=CACHES[cache], ctx_size=2048, ubatch=256, sparse=SparseOptions(method, options, min_len))


def decoded(model, ids, count):
    """Logits of the last `count` ids, one at a time, after the others at once."""
    sequence = model.new_sequence()
    model.forward([(sequence, ids[:-count])], "none")
    rows = np.concatenate([model.forward([(sequence, ids[i:i + 1])]) for i in range(len(ids) - count, len(ids))])
    return rows, sequence


def lists(sequence):
    """[group][head]: the pages of each list, None where it holds all."""
    return [[None if row[COUNT] < 0 else row[HEADER:HEADER + row[COUNT]].tolist() for row in group] for group in sequence.selection]


# ---- what is read ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", CACHES)
def test_a_step_reads_what_the_closed_form_says(nano_int4, cache):
    model, ids = load(nano_int4, cache), tokens(1100)
    _, sequence = decoded(model, ids, 3)
    found, scored = 0, 0
    for layer, group in enumerate(lists(sequence)):
        for head, pages in enumerate(group):
            entries = sequence.tables[layer, head, pages]
            found += sum(model.cache.pools[entry % POOLS].format.page_bytes for entry in entries)
            held = -(-sequence.counts[layer, head] // PAGE)
            last = min(held - 3, sequence.sealed[layer, head]) if cache == "int4" else held - 3
            scored += 4 * model.cache.head_dim * (last - 1)
    assert found + scored == model.scheduler.read_bytes(model.cache, len(ids))
    assert model.scheduler.figures()["read"] == pytest.approx(8 / 35, abs=1e-3)
    assert model.scheduler.figures()["read"] == 0  # counted once


@pytest.mark.parametrize("cache", CACHES)
def test_what_a_sequence_keeps_for_selections_is_in_the_plan(cache):
    scheduler = Scheduler(SparseOptions("quest", {"budget": 512}, 0), 4, 2)
    made = KVCache(4, 2, 64, 2048, CACHES[cache], selection=scheduler.selection_plan(2048))
    assert made.new_sequence().nbytes == made.plan.state_bytes()
    assert (made.new_sequence().index is None) == (cache == "int4")  # int4 pages know the range of their keys


def test_shares_give_heads_more_less_or_everything(nano_int4):
    model, ids = load(nano_int4), tokens(900)
    model.scheduler.shares[2, 0], model.scheduler.shares[3, 1], model.scheduler.shares[4, 0] = 0.5, ALL, 2.0
    _, sequence = decoded(model, ids, 2)
    found = lists(sequence)
    assert found[3][1] is None and len(found[3][0]) == 8
    always = 1 + sum(model.cache.pools[0].format == model.cache.pools[e % POOLS].format for e in sequence.tables[2, 0, 1:29])
    assert len(found[2][0]) == max(4, always) and found[4][0] is None and len(found[0][0]) == 8


def test_a_prompt_is_read_whole_though_its_last_piece_is_one_token(nano_int4):
    """257 tokens in chunks of 256: the last one is no decode step."""
    sparse, dense, ids = load(nano_int4, budget=64), load(nano_int4, method="off"), tokens(257)
    rows = [model.forward([(model.new_sequence(), ids)]) for model in (sparse, dense)]
    np.testing.assert_array_equal(*rows)
    assert sparse.scheduler.steps == [0, 0]


def test_steps_are_dense_below_the_minimum(nano_int4):
    ids = tokens(700)
    (rows, _), (expected, _) = (decoded(model, ids, 20) for model in (load(nano_int4, min_len=690), load(nano_int4, method="off")))
    np.testing.assert_array_equal(rows[:9], expected[:9])
    assert (rows[9:] != expected[9:]).any(1).all()


def test_a_batch_may_hold_dense_and_sparse_sequences(nano_int4):
    model, prompts = load(nano_int4, min_len=500), [tokens(n) for n in (100, 800, 400, 900)]
    alone = [decoded(model, ids, 1)[0] for ids in prompts]
    sequences = [model.new_sequence() for _ in prompts]
    model.forward([(s, ids[:-1]) for s, ids in zip(sequences, prompts)], "none")
    together = model.forward([(s, ids[-1:]) for s, ids in zip(sequences, prompts)])
    alone = np.concatenate(alone)
    error = np.abs(together - alone).mean(1) / alone.std()
    assert error.max() < 0.15, error  # pages may change places where sums are rounded in another order
    assert model.scheduler.steps == [4, 4]


# ---- lists that serve again ------------------------------------------------------------------------------------------
def test_lists_serve_again_while_they_hold(nano_int4):
    model, ids = load(nano_int4, reuse=0.01, budget=600), tokens(1000)
    _, sequence = decoded(model, ids, 20)
    rows = sequence.selection[..., :HEADER].reshape(-1, HEADER)
    assert (rows[:, INTERVAL] == 16).all()  # made at steps 1, 2, 4, 8, 16: each time for twice as long
    assert (rows[:, AGE] == 4).all() and (rows[:, SLOTS] == len(ids) - 4).all()
    assert model.scheduler.figures()["reused"] == pytest.approx(15 / 20)
    newest = (len(ids) - 1) // PAGE
    assert all(pages[-1] == newest and pages[0] == 0 for group in lists(sequence) for pages in group)


def test_lists_that_changed_much_are_made_at_every_step(nano_int4):
    model, ids = load(nano_int4, reuse=1.0), tokens(1000)
    fresh = load(nano_int4)
    (rows, _), (expected, _) = decoded(model, ids, 10), decoded(fresh, ids, 10)
    assert model.scheduler.figures()["reused"] < 15 / 20  # what lists that always hold come to
    assert np.abs(rows - expected).mean() < 0.2 * expected.std()


def test_truncation_and_eviction_void_lists(nano_int4):
    model, ids = load(nano_int4, "f16", reuse=0.01), tokens(1000)
    _, sequence = decoded(model, ids, 20)
    model.truncate(sequence, 980)
    assert (sequence.selection[..., SLOTS] == 0).all()
    rows = np.concatenate([model.forward([(sequence, ids[i:i + 1])]) for i in range(980, 1000)])
    again, _ = decoded(model, ids, 20)
    np.testing.assert_array_equal(rows, again)
    model = Model.load(nano_int4, cache=CacheOptions("int4", "int4", budget=1_500_000), ctx_size=2048,
                       sparse=SparseOptions("quest", {"budget": 128, "dense_layers": 0, "reuse": 0.01}, 0))
    limit = int(model.cache.plan.limits.min())
    sequence = model.new_sequence()
    model.forward([(sequence, tokens(limit - 5))], "none")
    for token in tokens(100):
        assert np.isfinite(model.forward([(sequence, [token])])).all()
        for layer, head in np.ndindex(model.cache.shape):
            row, held = sequence.selection[layer, head], -(-sequence.counts[layer, head] // PAGE)
            assert row[COUNT] < 0 or not row[SLOTS] or row[HEADER + row[COUNT] - 1] < held
    assert sequence.counts.max() < sequence.length


def test_a_fork_goes_on_with_lists_of_its_own(nano_int4):
    model, ids = load(nano_int4), tokens(900)
    _, a = decoded(model, ids, 5)
    b = model.fork(a)
    first, second = tokens(2)
    rows = [model.forward([(s, [token])]) for s, token in ((a, first), (b, second), (a, second))]
    assert not np.shares_memory(a.selection, b.selection)
    expected, _ = decoded(model, np.r_[ids, second], 6)
    np.testing.assert_allclose(rows[1], expected[-1:], atol=2e-3)


@pytest.mark.parametrize("cache", CACHES)
def test_a_restored_session_goes_on_bit_for_bit(nano_int4, cache, tmp_path):
    model, ids, more = load(nano_int4, cache), tokens(900), tokens(5)
    _, sequence = decoded(model, ids, 5)
    session.save(tmp_path / "s", model.cache, sequence, ids.tolist(), model.config, {})
    other = load(nano_int4, cache)
    restored, _, _ = session.load(tmp_path / "s", other.cache, other.config)
    for token in more:
        np.testing.assert_array_equal(model.forward([(sequence, [token])]), other.forward([(restored, [token])]))


# ---- where it begins -------------------------------------------------------------------------------------------------
TIMES = {"depths": [2000, 6000], "dense": [200e-6, 600e-6], "select": [10e-6, 30e-6], "attend": [200e-6, 200e-6]}


def begin(times, **options):
    return crossover.begin(times, SparseOptions("auto", options).policy())


def test_crossover_is_where_selection_pays():
    # 0.1 us a token dense; select 0.005 us a token; 2,048 tokens read: 204.8 + 0.005 n <= 0.95 * 0.1 n from 2,276 on
    assert begin(TIMES, fraction=0.0) == 2304
    assert begin(TIMES | {"select": [300e-6, 900e-6]}) == NEVER
    assert begin(TIMES, fraction=0.0, budget=4096) > 4096
    assert begin(TIMES, fraction=0.0, budget=256) == 512


def test_crossover_is_measured_once(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(crossover, "PROFILE", tmp_path / "device.json")
    monkeypatch.setattr(crossover, "measure", lambda *a: calls.append(1) or TIMES)
    for _ in range(2):
        scheduler = Scheduler(SparseOptions("auto", {"fraction": 0.0}), 2, 2)
        crossover.settle(scheduler, CACHES["int4"], 8, 64, 2)
        assert scheduler.min_len == 2304 and scheduler.times == TIMES
    assert len(calls) == 1
    crossover.settle(scheduler, CACHES["f16"], 8, 64, 2)  # another cache
    assert len(calls) == 2
    path = tmp_path / "device.json"
    assert list(json.loads(path.read_text())["crossovers"].values()) == [TIMES, TIMES]
    path.write_text("{")
    for kind in CACHES:
        crossover.settle(scheduler, CACHES[kind], 8, 64, 2)
    assert len(calls) == 2 + len(CACHES) and set(json.loads(path.read_text())) == {"crossovers"}


def test_a_busy_machine_tells_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(crossover, "PROFILE", tmp_path / "device.json")
    monkeypatch.setattr(crossover, "measure", lambda *a: TIMES | {"dense": [600e-6, 610e-6]})
    scheduler = Scheduler(SparseOptions("auto"), 2, 2)
    crossover.settle(scheduler, CACHES["int4"], 8, 64, 2)
    assert scheduler.min_len == 2560 and not list(tmp_path.iterdir())


def test_crossover_times_this_machine():
    scheduler, before = Scheduler(SparseOptions("auto"), 2, 2), numba.get_num_threads()
    times = crossover.measure(scheduler, CACHES["int4"], 4, 64, 1)
    numba.set_num_threads(before)
    assert all(len(values) == 2 and min(values) > 0 for values in times.values())


# ---- choices -----------------------------------------------------------------------------------------------------------
def test_mistakes_are_refused_in_a_line():
    for options, word in ((("nothing",), "one of"), (("quest", {"budgett": 3}), "no option"), (("quest", {"budget": -1}), "budget"),
                          (("quest", {"recent": 1}), "recent"), (("quest", {}, -1), "0 tokens")):
        with pytest.raises(ValueError, match=word) as error:
            SparseOptions(*options)
        assert "\n" not in str(error.value)


def test_auto_gives_way_and_says_why(nano_int4):
    small = Model.load(nano_int4, ctx_size=1024)
    assert small.scheduler is None and "all of the 1,024" in small.dense_because
    with pytest.raises(ValueError, match="--sparse-attention quest: --kv-eviction adore"):
        Model.load(nano_int4, cache=CacheOptions("int4", "int4", budget=2_000_000, eviction="adore"), sparse=SparseOptions("quest"))


def test_explain_tells_choices_and_numbers(nano_int4, edgeattn, tmp_path):
    text = tmp_path / "text"
    text.write_text("The old house stood on a hill and nobody had lived there for years. " * 60)
    done = edgeattn("generate", "-m", nano_int4, "-f", text, "-n", "4", "--kv-bits", "4", "--sparse-attention", "quest",
                    "--sparse-budget", "256", "--sparse-min-len", "0", "--explain")
    assert "sparse attention quest (budget 256" in done.stderr and "3 sparse" in done.stderr
    assert "layer 0: reads everything" in done.stderr and "layer 2: read " in done.stderr
    done = edgeattn("generate", "-m", nano_int4, "-p", "x", "-n", "1", "--sparse-attention", "off", "--explain")
    assert "sparse attention is off" in done.stderr
    done = edgeattn("generate", "-m", nano_int4, "-p", "x", "--sparse-attention", "off", "--sparse-budget", "3")
    assert done.returncode and "needs --sparse-attention" in done.stderr


def test_heads_that_look_things_up_read_more(nano_int4, tmp_path):
    scores = np.zeros((8, 2), np.float32)
    scores[5, 0], scores[6, 0], scores[1, 1] = 1.5, 0.9, 0.1
    shares = even_shares(scores)
    assert shares.mean() == pytest.approx(1) and (shares == 4).sum() == 2 and shares[5, 0] == shares[6, 0] == 4
    assert (even_shares(-scores - 1) == 1).all() and (even_shares(scores[:3]) == 1).all()  # nothing was found; too few heads
    folder = tmp_path / "model"
    shutil.copytree(nano_int4, folder)
    config = json.loads((folder / "edgeattn.json").read_text())
    calibration.save(folder / calibration.FILE, config, {"head_scores": scores}, {})
    model, ids = load(folder, budget=128), tokens(900)
    _, sequence = decoded(model, ids, 1)
    assert len(lists(sequence)[5][0]) == 16 and len(lists(sequence)[0][0]) <= 5  # no more than what is always read
    assert any("layer 5 head 0" in line for line in model.scheduler.explain())
    calibration.save(folder / calibration.FILE, config | {"precision": "other"}, {"head_scores": scores}, {})
    with pytest.raises(ValueError, match="another model"):
        load(folder)
    model = Model.load(folder, cache=CACHES["int4"], sparse=SparseOptions(min_len=0))  # auto does without, and says so
    assert (model.scheduler.shares == 1).all() and any("another model" in line for line in model.scheduler.explain())
