"""The engine: whatever is batched, shared, interrupted or cancelled, each answer is what its prompt alone gives."""
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.logits import Shaping
from edgeattn.apps.server.queue import Busy, FairQueue
from edgeattn.apps.server.run import Job, Run
from server_model import GREEDY, TOKENIZER, FakeModel, answer, ask, finish, greedy, job, next_logits, started  # noqa: F401


def test_answers_computed_together_are_those_of_each_prompt_alone(started):
    model = FakeModel()
    engine = started(model, parallel=4)
    prompts = [[400 + i, *range(500, 500 + 30 * i)] for i in range(6)]
    runs, ends = finish(engine, [job(prompt) for prompt in prompts])
    for prompt, run, end in zip(prompts, runs, ends):
        assert answer(run) == greedy(prompt, 8) and end.finish_reason == "length"
    assert max(batch.count(1) for batch in model.batches) == 4  # several tokens a step


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(0, 40), st.integers(1, 12), st.booleans()), min_size=1,
                max_size=8), st.integers(1, 4), st.sampled_from([130, 200, 400]), st.sampled_from([1, 32]))
def test_sharing_interruptions_and_full_caches_change_no_answer(asked, parallel, pages, granule):
    """Prompts of a few common beginnings and own ends, a cache with less room than they need together."""
    engine = Engine(FakeModel(ctx_size=128, ubatch=16, pages=pages, granule=granule), TOKENIZER, parallel=parallel).start()
    try:
        prompts = [[300 + kind] + [310 + kind] * common + list(range(700, 700 + own)) for kind, common, own, _, _ in asked]
        runs, ends = finish(engine, [job(prompt, count, scores=1 if score else None, score_prompt=score)
                                     for prompt, (_, _, _, count, score) in zip(prompts, asked)])
        for prompt, run, end, (_, _, _, count, score) in zip(prompts, runs, ends, asked):
            assert end.finish_reason == "length" and answer(run) == greedy(prompt, min(count, 129 - len(prompt)))
            assert len(run.prompt_scores) == (len(prompt) if score else 0)
    finally:
        engine.close()


def test_prompt_scores_are_the_model_s_log_probabilities(started):
    engine, prompt = started(FakeModel(ubatch=16)), list(range(600, 650))
    prompt = prompt[:1] + [int(next_logits(prompt[:1]).argmax())] + prompt[1:]
    (run,), _ = finish(engine, [job(prompt, 1, scores=2, score_prompt=True)])
    assert run.prompt_scores[0].logprob is None
    for place in (1, 2, 17, 50):
        logits = next_logits(prompt[:place]).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum())
        score = run.prompt_scores[place]
        assert score.token == prompt[place] and score.logprob == pytest.approx(expected[prompt[place]])
        assert [value for _, value in score.top] == pytest.approx(sorted(expected)[::-1][:2])
    assert run.prompt_scores[1].top[0][0] == prompt[1]


def test_a_second_turn_computes_only_what_is_new(started):
    model = FakeModel()
    engine, prompt = started(model), list(range(400, 500))
    (first,), _ = finish(engine, [job(prompt)])
    before = model.computed
    longer = [*prompt, *answer(first), 777, 778]
    (second,), _ = finish(engine, [job(longer)])
    assert second.cached == 107 and model.computed - before == len(longer) - 107 + 7  # the newest answer's last token was never computed
    assert answer(second) == greedy(longer, 8)


def test_another_end_leaves_the_first_conversation_in_the_cache(started):
    engine, common = started(), list(range(400, 500))
    one, other = [*common, *range(1000, 1100)], [*common, *range(2000, 2100)]
    finish(engine, [job(one)])
    (branch,), _ = finish(engine, [job(other)])
    (again,), _ = finish(engine, [job(one)])
    assert branch.cached == 100 and again.cached == len(one) - 1


def test_choices_of_one_prompt_read_it_once(started):
    model = FakeModel()
    engine, prompt = started(model), list(range(400, 500))
    shared = job(prompt)
    runs, _ = finish(engine, [shared, shared, shared])
    assert [run.cached for run in runs] == [0, 99, 99] and all(answer(run) == greedy(prompt, 8) for run in runs)
    assert model.computed == 100 + 1 + 1 + 3 * 7


def test_a_long_prompt_does_not_hold_up_running_answers(started):
    model = FakeModel(ctx_size=4096, ubatch=512)
    engine = started(model)
    _, news = ask(engine, [job([400], 1000)])
    news.get(timeout=30)
    finish(engine, [job(range(300, 300 + 2000), 1)])
    mixed = [batch for batch in model.batches if len(batch) > 1 and max(batch) > 1]
    assert mixed and all(batch.count(1) >= 1 and max(batch) <= 128 for batch in mixed)


def test_who_cancels_is_told_nothing_more_and_leaves_room(started):
    engine = started(FakeModel(ctx_size=4096, delay=0.002), parallel=1)
    (run,), news = ask(engine, [job([400], 4000)])
    news.get(timeout=30)
    engine.cancel(run)
    _, (end,) = finish(engine, [job([401], 3)])
    assert end.finish_reason == "length" and run.done and run.generated < 4000


def test_more_than_may_wait_are_refused(started):
    engine = started(FakeModel(delay=0.01), parallel=1, most_waiting=2)
    runs, _ = ask(engine, [job([400 + i], 50) for i in range(3)])
    with pytest.raises(Busy, match="3 requests"):
        engine.submit([job([500])], [lambda piece: None])
    for run in runs:
        engine.cancel(run)
    deadline = time.monotonic() + 30
    while engine.status()["running"] + engine.status()["waiting"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert finish(engine, [job([500], 2)])[1][0].finish_reason == "length"


def test_time_limits_end_answers_and_waiting(started):
    engine = started(FakeModel(delay=0.01, ctx_size=4096), parallel=1)
    soon = time.monotonic() + 0.3
    runs, ends = finish(engine, [job([400], 4000, deadline=soon), job([401], 5, deadline=soon)])
    assert ends[0].finish_reason == "length" and 0 < runs[0].generated < 4000
    assert ends[1].busy and "time limit" in ends[1].error


@pytest.mark.parametrize("prompt, count, message", [([], 8, "empty"), (range(512), 8, "512 tokens and the context 512"),
                                                    ([8192], 8, "0 to 8191"), ([-1], 8, "0 to 8191")])
def test_impossible_prompts_are_refused(started, prompt, count, message):
    with pytest.raises(ValueError, match=message):
        ask(started(), [job(prompt, count)])


def test_a_prompt_that_fits_no_cache_is_told_so(started):
    engine = started(FakeModel(pages=50))
    _, (end,) = finish(engine, [job(range(400, 500))])
    assert "does not fit the KV cache" in end.error and not end.busy
    assert finish(engine, [job(range(400, 440), 2)])[1][0].finish_reason == "length"


def test_an_error_in_the_model_ends_its_answers_and_nothing_else(started, monkeypatch, capsys):
    model = FakeModel()
    engine, forward = started(model), model.forward
    monkeypatch.setattr(model, "forward", lambda work, logit_rows: 1 / 0)
    _, (end,) = finish(engine, [job([400])])
    assert end.error == "internal error: ZeroDivisionError" and "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(model, "forward", forward)
    assert finish(engine, [job([400])])[1][0].finish_reason == "length"


def test_a_listener_that_fails_hurts_nobody_else(started):
    engine = started(FakeModel(delay=0.001))
    (run,) = engine.submit([job([400], 400)], [lambda piece: 1 / 0])
    assert finish(engine, [job([401], 20)])[1][0].finish_reason == "length"
    assert run.done and run.generated < 400


def test_close_ends_everything(started):
    engine = started(FakeModel(delay=0.01, ctx_size=4096), parallel=1)
    _, news = ask(engine, [job([400], 4000), job([401], 4000)])
    threading.Timer(0.2, engine.close).start()
    ends = []
    while len(ends) < 2:
        piece = news.get(timeout=30)[1]
        ends += [piece.finish_reason] if piece.finish_reason else []
    assert ends == ["cancelled", "cancelled"]
    with pytest.raises(Busy):
        ask(engine, [job([400])])


def order_of(waiting):
    """Takes all runs out."""
    order = []
    while len(waiting):
        run = waiting.next(lambda run: True)
        waiting.remove(run)
        order.append(run.job.prompt[0])
    return order


def test_clients_take_turns():
    waiting = FairQueue()
    for client, number in (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("c", 5)):
        waiting.put(Run(Job([number], client=(client, "")), print))
    assert order_of(waiting) == [1, 4, 5, 2, 3]


def test_names_share_the_turns_of_their_address():
    """So whoever invents a name for each request gains nothing, and users behind one address take turns."""
    waiting = FairQueue()
    for address, name, number in (("a", "1", 1), ("a", "2", 2), ("a", "3", 3), ("b", "", 4), ("b", "", 5), ("b", "", 6)):
        waiting.put(Run(Job([number], client=(address, name)), print))
    assert order_of(waiting) == [1, 4, 2, 5, 3, 6]
    for name, number in (("anna", 1), ("anna", 2), ("anna", 3), ("ben", 4), ("", 5)):
        waiting.put(Run(Job([number], client=("proxy", name)), print))
    assert order_of(waiting) == [1, 4, 5, 2, 3]


def test_bias_and_penalties_change_logits_as_the_api_says():
    logits = np.zeros(8, np.float32)
    shaped = Shaping(bias=((1, 5.0), (2, -100.0)), presence=0.5, frequency=0.25).apply(logits, [3, 3, 4])
    assert shaped[[0, 1, 3, 4]] == pytest.approx([0, 5, -1.0, -0.75]) and shaped[2] < -1e29
    assert not logits.any() and Shaping().apply(logits, [3]) is logits


@pytest.mark.parametrize("cache", [{}, {"k_type": "int4", "v_type": "int4"}], ids=["f16", "int4"])
def test_answers_of_a_real_model_survive_a_full_cache(nano_fp32, cache):
    """Three answers of which the context holds two: one gives way, and goes on when there is room."""
    from edgeattn.cache.options import CacheOptions
    from edgeattn.generation import generate
    from edgeattn.runtime import Model
    from edgeattn.tokenizer import Tokenizer
    tokenizer, options = Tokenizer(nano_fp32), CacheOptions(**cache)
    prompts = [tokenizer.encode(f"{name} walked along the river until the old mill came into sight, and then " * 8)
               for name in ("Anna", "Jonas", "The miller")]
    model, expected = Model.load(nano_fp32, cache=options, ctx_size=512), []
    for prompt in prompts:
        sequence = model.new_sequence()
        run = generate(model, tokenizer, sequence, prompt, GREEDY, 70, end_tokens=frozenset())
        expected.append([event.token for event in run if event.token is not None])
        model.free(sequence)
    engine = Engine(model, tokenizer).start()
    engine.tokenizer.end_tokens = frozenset()
    try:
        assert sum(map(len, prompts)) < 512 < sum(map(len, prompts)) + 3 * 70
        runs, ends = finish(engine, [job(prompt, 70) for prompt in prompts])
        assert [end.finish_reason for end in ends] == ["length"] * 3 and [len(answer(run)) for run in runs] == [70] * 3
        if not cache:  # quantised pages come about in other pieces when a text is computed again
            assert [answer(run) for run in runs] == expected
        engine._prefixes.clear()
        assert model.kv_bytes() < 1 << 20 and all(pool.used == 0 for pool in model.cache.pools)
    finally:
        engine.close()
