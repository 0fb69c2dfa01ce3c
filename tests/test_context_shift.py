"""A full context: some tokens go, and what is left is as if nothing had stood before it."""
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import given, strategies as st

from edgeattn.cache.options import CacheOptions
from edgeattn.context_shift import ContextShift
from edgeattn.conversation import Conversation
from edgeattn.exporters import check
from edgeattn.exporters.export import export
from edgeattn.generation import Generation, SamplerOptions
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parent.parent / "models/nano")
CONTEXT, UBATCH = 192, 64
CACHES = {
    "f32": CacheOptions("f32", "f32"),
    "f16": CacheOptions("f16", "f16"),
    "int4": CacheOptions("int4", "int4", window=32),
    "zipcache": CacheOptions("int8", "int8", storage="zipcache", window=32),
    "evicting": CacheOptions("f32", "f32", budget=200_000, eviction="h2o", window=32),
    "budget": CacheOptions("f32", "f32", budget=200_000, eviction="none", window=32),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.save_tiny("llama", path / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "_runtime_logits", check._onnxruntime_logits)
        export(path / "checkpoint", path / "out", "fp32", 16)
    return path / "out"


def load(folder, cache="f32"):
    return Model.load(folder, cache=CACHES[cache], ctx_size=CONTEXT, ubatch=UBATCH, threads=1)


class Spy:
    """A model that remembers the ids that its sequence holds, and after which ids which logits came."""

    def __init__(self, model):
        self._model, self.ids, self.seen, self.cuts, self.before_forward = model, [], [], [], None

    def __getattr__(self, name):
        return getattr(self._model, name)

    def truncate(self, sequence, length):
        kept = self._model.truncate(sequence, length)
        self.cuts.append((len(self.seen), kept))
        del self.ids[kept:]
        return kept

    def forward(self, work, logit_rows="last"):
        if self.before_forward:
            self.before_forward()
        logits = self._model.forward(work, logit_rows)
        self.ids += work[0][1]
        assert work[0][0].length == len(self.ids) <= self._model.ctx_size
        self.seen.append((list(self.ids), logits))
        return logits


def start(model, sequence=None, prompt=tuple(range(3, 103)), max_tokens=-1, shift=ContextShift(40), **more):
    """A greedy generation that no token ends."""
    return Generation(model, TOKENIZER, sequence or model.new_sequence(), list(prompt), SamplerOptions(temperature=0), max_tokens,
                      shift=shift, **more)


@pytest.mark.parametrize("cache", CACHES)
def test_what_follows_a_shift_is_a_fresh_run_on_the_kept_tokens(cache, folder):
    model = Spy(load(folder, cache))
    limit, run = model.ctx_size, start(model, max_tokens=3 * CONTEXT)
    events = list(run)
    assert [event.token for event in events[:3 * CONTEXT]] == run.tokens and len(run.tokens) == 3 * CONTEXT
    assert run.finish_reason == "length" and run.cached == model.ids
    shifts = [cut for cut in model.cuts if cut[0]]
    assert len(shifts) >= 3 * CONTEXT // limit
    text, dropped, keep = [*range(3, 103), *run.tokens], 0, min(40, limit // 2)
    for index, kept in shifts:
        ids, logits = next((ids, logits) for ids, logits in model.seen[index:] if len(logits))
        dropped += limit + 1 - len(ids)
        assert ids == text[:keep] + text[keep + dropped:len(ids) + dropped] and len(ids) == keep + (limit - keep) // 2
        assert kept == (keep if model.cache.exact else 0)
        fresh = load(folder, cache)
        expected = fresh.forward([(fresh.new_sequence(), ids)])
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4 if kept else 0)
        if cache == "f16":  # keys and values computed in other chunks round to other halves
            np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-3)
    assert run.dropped == dropped and run.token_ids == text[:keep] + text[keep + dropped:]


def test_without_it_a_full_context_ends_the_text(folder):
    model = Spy(load(folder))
    run = start(model, shift=None)
    list(run)
    assert run.finish_reason == "context" and run.dropped == 0 and len(run.cached) == CONTEXT
    assert run.token_ids == model.ids + run.tokens[-1:]


def test_cancelled_within_a_shift(folder):
    model, run = Spy(load(folder)), None
    run = start(model)

    def cancel():
        if len(model.seen) > 1 and model.cuts:
            run.cancel()
    model.before_forward = cancel
    list(run)
    assert run.finish_reason == "cancelled" and run.cached == model.ids and run.token_ids[:len(run.cached)] == model.ids


def test_an_interrupted_shift_leaves_a_consistent_cache(folder):
    model = Spy(load(folder))
    run = start(model)

    def interrupt():
        if model.cuts:
            raise KeyboardInterrupt
    model.before_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(run)
    assert run.cached == model.ids == list(range(3, 43))


def test_ids_of_what_is_cached_are_needed(folder):
    model = load(folder)
    sequence = model.new_sequence()
    model.forward([(sequence, [5, 6, 7])])
    with pytest.raises(ValueError, match="ids of all 3 tokens"):
        start(model, sequence)
    assert start(model, sequence, context_ids=[5, 6, 7]).cached == [5, 6, 7]


@given(length=st.integers(0, 400), limit=st.integers(4, 100), keep=st.none() | st.integers(0, 200), dropped=st.integers(0, 500))
def test_cut(length, limit, keep, dropped):
    ids, shift = list(range(length)), ContextShift(keep)
    left, gone = shift.cut(ids, limit, dropped)
    kept = shift.kept(limit)
    assert left == ids[:kept] + ids[kept + gone:] and len(left) < limit and kept <= limit // 2
    assert shift.cut(ids, limit, gone) == (left, gone)
    if length < limit:
        assert gone <= dropped and shift.cut(ids, limit) == (ids, 0)
    assert gone == 0 or length - kept - gone >= (limit - kept) // 2
    with pytest.raises(ValueError, match="-1"):
        ContextShift(-1)


# ---- conversations -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("system, keep", [("Answer in one word, always.", None), (None, None), (None, 7)])
def test_a_conversation_that_outgrows_its_context_goes_on(system, keep, nano_int4):
    model = Spy(Model.load(nano_int4, cache=CACHES["f16"], ctx_size=160, ubatch=64, threads=1))
    chat = Conversation(model, TOKENIZER, SamplerOptions(seed=1), system, max_tokens=40, shift=ContextShift(keep))
    first, dropped, reused = None, 0, 0
    for turn in range(12):
        assert "".join(event.text for event in chat.say(f"Question {turn}: what is the capital of France, and of Spain?"))
        dropped += chat.last.dropped
        reused += chat.last.timings.cached_tokens > 40
        first = first or model.ids[:chat.last._shift.kept(160)]
        assert model.ids[:len(first)] == first and chat.tokens == len(model.ids) <= 160
        assert f"Question {turn}" in TOKENIZER.decode(model.ids)
    assert dropped > 100 and len(chat.messages) == 24 + bool(system) and reused >= 4  # turns without a shift compute what is new
    if system:
        assert system in TOKENIZER.decode(model.ids)
    chat.clear()
    list(chat.say("hi"))
    assert chat.last.dropped == 0


def test_a_question_longer_than_the_context(nano_int4):
    model = Model.load(nano_int4, cache=CACHES["int4"], ctx_size=128, ubatch=64, threads=1)
    chat = Conversation(model, TOKENIZER, SamplerOptions(seed=1), max_tokens=20, shift=ContextShift())
    list(chat.say("one two three four five six seven eight nine ten " * 40))
    assert len(chat.last.tokens) and chat.last.dropped > 128 and len(chat.messages) == 2
    plain = Conversation(model, TOKENIZER, SamplerOptions(seed=1), max_tokens=20)
    with pytest.raises(ValueError, match="/clear"):
        plain.say("one two three four five six seven eight nine ten " * 40)


def test_the_saved_conversation_goes_on_after_a_shift(nano_int4, tmp_path):
    def fresh():
        model = Model.load(nano_int4, cache=CACHES["f16"], ctx_size=160, ubatch=64, threads=1)
        return Conversation(model, TOKENIZER, SamplerOptions(seed=1), max_tokens=40, shift=ContextShift())
    chat, again = fresh(), fresh()
    for turn in range(5):
        list(chat.say(f"Question {turn}: what is the capital of France, and of Spain?"))
    chat.save(tmp_path / "session")
    again.restore(tmp_path / "session")
    for one in (chat, again):
        list(one.say("And of Italy?"))
    assert chat.messages == again.messages and chat.last.timings.cached_tokens == again.last.timings.cached_tokens


def test_commands(edgeattn, nano_int4):
    asked = ["-m", nano_int4, "--temp", 0, "-c", 64]
    done = edgeattn("generate", "-p", "Once upon a time", "-n", 100, *asked)
    assert "the context is full" in done.stderr and "forgotten" not in done.stderr
    done = edgeattn("generate", "-p", "Once upon a time", "-n", 100, *asked, "--context-shift", "--keep", 4)
    assert done.returncode == 0 and "100 tokens at" in done.stderr and "tokens behind the first ones were forgotten" in done.stderr
    done = edgeattn("chat", "-n", 100, *asked, "--context-shift", stdin="Tell me a story of a king and a queen and a dragon, please.\n" * 4)
    assert done.returncode == 0 and "were forgotten" in done.stderr
    assert "--context-shift" in edgeattn.fails("chat", *asked, "--keep", 4)
