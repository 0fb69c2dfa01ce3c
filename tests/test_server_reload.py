"""Other settings while the server runs: answers go on, and no request waits for ever."""
import threading
import time

import pytest
from server_model import TOKENIZER, FakeModel, answer, ask, finish, greedy, job, started  # noqa: F401

from edgeattn.apps.server import reload
from edgeattn.apps.server.queue import Busy


def test_reload_goes_on_with_running_answers(started):
    loaded = []

    def load(changes):
        if changes.get("ctx_size") == 13:
            raise ValueError("too small")
        loaded.append(FakeModel(ctx_size=changes["ctx_size"], delay=0.001))
        return loaded[-1], TOKENIZER
    engine = started(FakeModel(delay=0.001), load=load)
    (run,), news = ask(engine, [job([400, 401], 300)])
    news.get(timeout=30)
    with pytest.raises(ValueError, match="too small"):
        engine.reload({"ctx_size": 13})
    status = engine.reload({"ctx_size": 1024})
    assert status["ctx_size"] == 1024 and status["settings"] == {"ctx_size": 1024}
    while news.get(timeout=30)[1].finish_reason is None:
        pass
    assert answer(run) == greedy([400, 401], 300) and loaded[0].batches


def held(model):
    """A model whose next calls wait: (it has begun, let it go)."""
    begun, go, forward = threading.Event(), threading.Event(), model.forward

    def waiting(work, logit_rows):
        begun.set()
        assert go.wait(30)
        return forward(work, logit_rows)
    model.forward = waiting
    return begun, go


def test_reload_gives_up_when_the_model_is_busy(started, monkeypatch):
    monkeypatch.setattr(reload, "BEGIN", 0.2)
    model, loads = FakeModel(), []
    engine = started(model, load=lambda changes: loads.append(changes) or (FakeModel(), TOKENIZER))
    begun, go = held(model)
    (run,), news = ask(engine, [job([400], 3)])
    begun.wait(30)
    with pytest.raises(Busy, match="nothing was changed"):
        engine.reload({"ctx_size": 64})
    go.set()
    while news.get(timeout=30)[1].finish_reason is None:
        pass
    assert engine.status()["settings"] == {} and loads == [] and answer(run) == greedy([400], 3)
    assert engine.reload({"ctx_size": 64})["settings"] == {"ctx_size": 64}


def test_one_reload_at_a_time_and_none_for_ever(started, monkeypatch):
    monkeypatch.setattr(reload, "LOAD", 0.2)
    begun, go = threading.Event(), threading.Event()

    def load(changes):
        begun.set()
        assert go.wait(30)
        return FakeModel(), TOKENIZER
    engine = started(load=load)
    with pytest.raises(Busy, match="still being loaded"):
        engine.reload({"ctx_size": 64})
    with pytest.raises(Busy, match="already"):
        engine.reload({"ctx_size": 128})
    go.set()
    finish(engine, [job([400], 2)])
    assert engine.status()["settings"] == {"ctx_size": 64}


def test_a_reload_ends_when_the_engine_does(started):
    model = FakeModel()
    engine = started(model, load=lambda changes: (FakeModel(), TOKENIZER))
    begun, go = held(model)
    ask(engine, [job([400], 100)])
    begun.wait(30)
    threading.Timer(0.2, lambda: (engine.stop(), go.set())).start()
    with pytest.raises(Busy, match="stopping"):
        engine.reload({})
    engine.close()
    with pytest.raises(Busy, match="stopping"):
        engine.reload({})
    assert not engine.alive


def test_answers_that_a_smaller_context_does_not_hold_end_in_words(started):
    model = FakeModel(delay=0.002)
    engine = started(model, load=lambda changes: (FakeModel(ctx_size=changes["ctx_size"]), TOKENIZER), parallel=2)
    prompts = [list(range(400, 500)), list(range(500, 510)), list(range(600, 700)), list(range(700, 710))]  # two run, two wait
    runs, news = ask(engine, [job(prompt, 400) for prompt in prompts])
    while min(run.generated for run in runs[:2]) < 60:
        time.sleep(0.01)
    assert engine.reload({"ctx_size": 64})["ctx_size"] == 64
    ends = {}
    while len(ends) < 4:
        index, piece = news.get(timeout=30)
        if piece.finish_reason or piece.error:
            ends[index] = piece
    assert all("100 tokens and the context 64" in ends[index].error for index in (0, 2))
    assert ends[1].finish_reason == ends[3].finish_reason == "length" and answer(runs[1])[:60] == greedy(prompts[1], 60)
    assert answer(runs[3]) == greedy(prompts[3], 55)


def test_a_panic_of_a_library_ends_its_answers_and_nothing_else(started, monkeypatch, capsys):
    class Panic(BaseException):
        pass

    def fail(work, logit_rows):
        raise Panic
    model = FakeModel()
    engine, forward = started(model), model.forward
    model.forward = fail
    assert finish(engine, [job([400])])[1][0].error == "internal error: Panic" and "Panic" in capsys.readouterr().err
    model.forward = forward
    assert finish(engine, [job([400])])[1][0].finish_reason == "length"
