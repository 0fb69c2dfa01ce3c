"""Sparse prefill through the runtime: which chunks, what they read, and that it goes with caches, budgets and decode policies."""
import numpy as np
import pytest

from edgeattn import crossover, prefill_crossover
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu.cached_attention import ARGS
from edgeattn.prefill_scheduler import PrefillOptions, PrefillScheduler
from edgeattn.runtime import Model
from edgeattn.scheduler import NEVER, SparseOptions

RNG = np.random.default_rng()
CACHES = {"f16": {"k_type": "f16", "v_type": "f16"}, "int4": {"k_type": "int4", "v_type": "int4"},
          "hadamard": {"k_type": "int4", "v_type": "int4", "storage": "hadamard"}}


def tokens(n):
    return RNG.integers(4, 8000, n)


def load(folder, method="off", cache="int4", min_len=0, **options):
    return Model.load(folder, cache=CacheOptions(**CACHES[cache]), ctx_size=2048, ubatch=256, sparse=SparseOptions("off"),
                      prefill=PrefillOptions(method, options, min_len))


def read(model, ids, pieces=None):
    sequence, rows, start = model.new_sequence(), [], 0
    for size in pieces or [len(ids)]:
        rows.append(model.forward([(sequence, ids[start:start + size])], "all"))
        start += size
    return np.concatenate(rows), sequence


def distance(a, b):
    """KL of the next token's distributions, mean over rows."""
    p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True) for x in (a, b))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("cache", CACHES)
def test_a_plan_of_everything_is_dense_and_a_tight_one_is_not(nano_int4, cache):
    ids = tokens(1100)
    dense, _ = read(load(nano_int4, cache=cache), ids)
    everything, some = load(nano_int4, "oracle", cache, fraction=1.0), load(nano_int4, "streaming", cache, sink=1, recent=2)
    close, far = (distance(dense, read(model, ids)[0]) for model in (everything, some))
    assert close < 0.01 < far, (close, far)  # 8-bit arithmetic on both sides, but for the plain float cache
    assert everything.prefill.figures()["density"] == pytest.approx(1) and some.prefill.figures()["read"] < 0.5


def test_chunks_are_dense_below_the_minimum_and_at_the_prompts_end(nano_int4):
    ids = tokens(1030)
    model = load(nano_int4, "random", min_len=800, fraction=0.05)
    dense, rows = read(load(nano_int4), ids)[0], read(model, ids)[0]
    assert model.prefill.chunks == [4, 1]  # 256, 512, 768 tokens are too few, 1,024 not; the six last tokens come alone
    np.testing.assert_array_equal(rows[:768], dense[:768])
    assert (rows[768:] != dense[768:]).any(1).all()


def test_what_is_read_of_a_prompts_last_blocks_is_everything(nano_int4):
    ids = tokens(1024)
    model = load(nano_int4, "streaming", sink=1, recent=0)
    read(model, ids[:768])
    model.prefill.figures()
    read(model, ids, [512, 512])
    found = model.prefill.shares()
    alone = load(nano_int4, "streaming", sink=1, recent=0)
    sequence = alone.new_sequence()
    alone.forward([(sequence, ids)], "none")
    assert (found[:, 1] > alone.prefill.shares()[:, 1]).all()  # twice the ends


def test_what_is_read_is_of_all_pairs_whatever_chunks_they_were_in(nano_int4):
    model, sizes, parts = load(nano_int4, "streaming", sink=1, recent=2), (256, 512, 192, 768), []
    read(model, ids := tokens(sum(sizes)), sizes)
    whole, sequence, past = model.prefill.figures(), model.new_sequence(), 0
    for size in sizes:
        model.forward([(sequence, ids[past:past + size])], "none")
        chunks = [(past + start, min(256, size - start)) for start in range(0, size, 256)]
        pairs = sum(before * n + n * (n + 1) / 2 for before, n in chunks if before)  # the first has nothing before it, and is dense
        parts.append((pairs, *model.prefill.figures().values()))
        past += size
    pairs, density, share, _ = np.array(parts).T
    assert whole["read"] == pytest.approx(np.average(share, weights=pairs)) != pytest.approx(share[1:].mean(), rel=0.02)
    assert whole["density"] == pytest.approx(np.average(density, weights=pairs))


def test_pieces_and_neighbours_change_nothing(nano_int4):
    model, a, b = load(nano_int4, "dhsa", density=0.2), tokens(700), tokens(300)
    alone = [read(model, ids)[0][-1:] for ids in (a, b)]
    sequences = [model.new_sequence() for _ in range(2)]
    together = model.forward([(sequences[0], a), (sequences[1], b)], "last")
    assert distance(np.concatenate(alone), together) < 0.05


@pytest.mark.parametrize("options", [{"budget": 1_200_000}, {"budget": 1_200_000, "eviction": "snapkv"},
                                     {"budget": 1_000_000, "eviction": "streaming_llm"}])
def test_budgets_go_with_it(nano_int4, options):
    model = Model.load(nano_int4, cache=CacheOptions("int4", "int4", **options), ctx_size=2048, sparse=SparseOptions("auto"),
                       prefill=PrefillOptions("dhsa", {"density": 0.2}, 0))
    sequence = model.new_sequence()
    logits = model.forward([(sequence, tokens(1500))])
    for token in tokens(5):
        logits = model.forward([(sequence, [token])])
    assert np.isfinite(logits).all() and model.prefill.chunks[1] and model.kv_bytes() <= options["budget"]


def test_decode_policies_read_what_sparse_prefill_wrote(nano_int4):
    model = Model.load(nano_int4, cache=CacheOptions("int4", "int4"), ctx_size=2048, sparse=SparseOptions("quest", {"budget": 256}, 0),
                       prefill=PrefillOptions("xattention", {}, 0))
    _, sequence = read(model, tokens(900))
    model.prefill.figures()
    assert np.isfinite(model.forward([(sequence, [7])])).all()
    assert model.scheduler.steps == [0, 1] and model.prefill.chunks == [0, 0] and 0.2 < model.scheduler.figures()["read"] < 0.6


def test_a_failed_call_leaves_nothing_behind(nano_int4, monkeypatch):
    model, ids = load(nano_int4, "dhsa"), tokens(600)
    expected, _ = read(model, ids)
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return choose(*args)
    choose = model.prefill.choose
    monkeypatch.setattr(model.prefill, "choose", fail)
    sequence = model.new_sequence()
    with pytest.raises(KeyboardInterrupt):
        model.forward([(sequence, ids)])
    assert sequence.length == 0
    monkeypatch.undo()
    np.testing.assert_array_equal(read(model, ids)[0], expected)


@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_auto_gives_way_where_no_prompt_is_long_enough(nano_int4, cache):
    """Then caches of floats need no kernel that reads lists in 8 bits."""
    def loaded(ctx_size, method="auto", min_len=None):
        model = Model.load(nano_int4, cache=CacheOptions(**CACHES[cache]), ctx_size=ctx_size, sparse=SparseOptions("off"),
                           prefill=PrefillOptions(method, {}, min_len))
        rows = [step.row for step in model.plan.steps if step.operator == "cached_attention"]
        assert {bool(row[1 + ARGS.index("prefill.attend_listed")]) for row in rows} == {model.prefill is not None}
        return model
    small = loaded(1024)  # its least budget
    assert small.prefill is None and small.whole_because == "no prompt in a context of 1,024 tokens is long enough for it"
    assert loaded(2048, "auto", 2048).prefill is None and loaded(512, "dhsa").prefill.min_len == 1024
    model = loaded(2048, "auto", 1024)
    read(model, tokens(1056))
    assert model.prefill.chunks[1] and not model.whole_because


# ---- where auto begins -----------------------------------------------------------------------------------------------
TIMES = {"depths": [2000, 6000], "dense": [0.02, 0.06], "choose": [0.001, 0.003], "attend": [0.02, 0.03]}
AUTO = {"budget": 2000, "fraction": 0.0}


def test_the_crossover_is_where_choosing_and_reading_pay():
    policy = PrefillOptions("auto", AUTO).policy()
    # 10 us a token dense; 2,000 tokens read take 1.5 times the dense time of so many: 30 ms + 0.5 us n <= 9.5 us n from 3,334 on
    assert prefill_crossover.begin(TIMES, policy) == 3584
    assert prefill_crossover.begin(TIMES | {"attend": [0.02, 0.02]}, policy) == 2304  # 20 ms + 0.5 us n, from 2,223 on
    assert prefill_crossover.begin(TIMES | {"choose": [0.03, 0.09]}, policy) == NEVER


def test_the_crossover_is_measured_once(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(crossover, "PROFILE", tmp_path / "device.json")
    monkeypatch.setattr(prefill_crossover, "measure", lambda *a: calls.append(1) or TIMES)

    def settled(cache, method="auto", **options):
        scheduler = PrefillScheduler(PrefillOptions(method, options), 2)
        prefill_crossover.settle(scheduler, CacheOptions(**CACHES[cache]), 8, 2, 64, 2)
        return scheduler.min_len, len(calls)
    assert settled("int4", **AUTO) == settled("int4", **AUTO) == (3584, 1)
    assert settled("f16", **AUTO) == (3584, 2) and settled("int4", "xattention") == (1024, 2)
    monkeypatch.setattr(prefill_crossover, "measure", lambda *a: TIMES | {"dense": [0.06, 0.06]})  # too busy to tell
    assert settled("hadamard") == (3072, 2)


def test_what_is_measured_are_three_times_at_two_depths():
    scheduler = PrefillScheduler(PrefillOptions("auto"), 2)
    times = prefill_crossover.measure(scheduler, CacheOptions("int4", "int4"), 4, 2, 64, 2)
    assert [len(times[name]) for name in ("depths", "dense", "choose", "attend")] == [2] * 4
    assert all(0 < seconds < 10 for name in ("dense", "choose", "attend") for seconds in times[name])


def test_mistakes_are_refused_in_a_line(nano_int4):
    for options, word in ((("nothing",), "one of"), (("dhsa", {"densitty": 1}), "no option"), (("dhsa", {}, -1), "0 tokens")):
        with pytest.raises(ValueError, match=word) as error:
            PrefillOptions(*options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--sparse-prefill dhsa: --kv-eviction adore"):
        Model.load(nano_int4, cache=CacheOptions("int4", "int4", budget=2_000_000, eviction="adore"), sparse=SparseOptions("off"),
                   prefill=PrefillOptions("dhsa"))


def test_explain_tells_choices_and_numbers(nano_int4, edgeattn, tmp_path):
    text = tmp_path / "text"
    text.write_text("The old house stood on a hill and nobody had lived there for years. " * 90)
    done = edgeattn("generate", "-m", nano_int4, "-f", text, "-n", "2", "--kv-bits", "4", "--sparse-prefill", "dhsa",
                    "--sparse-min-len", "0", "--explain")
    assert "sparse prefill dhsa (" in done.stderr and "layer 0: plans hold " in done.stderr
    done = edgeattn("generate", "-m", nano_int4, "-p", "x", "-n", "1", "--sparse-prefill", "off", "--explain")
    assert "sparse prefill is off" in done.stderr
