"""Sampling, stop strings and conversations, over a small stand-in for the runtime."""
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.cache.pages import CacheFull
from edgeattn.conversation import Conversation
from edgeattn.generation import SamplerOptions, Sampler, StopStrings, generate
from edgeattn.ops import load_kernel
from edgeattn.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parent.parent / "models/nano")
GREEDY = SamplerOptions(temperature=0)
REFERENCE = load_kernel("sample", "reference")


class FakeSequence:
    def __init__(self):
        self.ids = []

    @property
    def length(self):
        return len(self.ids)


class FakeModel:
    """Says `script` again and again: after the prompt come its tokens in turn, at even odds with random ones when sampling."""

    def __init__(self, script, ctx_size=512, ubatch=16):
        self.script, self.ctx_size, self.ubatch, self.vocab_size = itertools.cycle(script), ctx_size, ubatch, 8192
        self.calls, self.interrupt_at, self.room = [], None, ctx_size  # tokens that other sequences leave room for

    def new_sequence(self):
        return FakeSequence()

    def truncate(self, sequence, length):
        assert 0 <= length <= sequence.length
        del sequence.ids[length:]
        return length

    def forward(self, work, logit_rows="last"):
        (sequence, ids), = work
        if sequence.length + len(ids) > min(self.ctx_size, self.room):
            raise CacheFull("context is full")
        if len(self.calls) == self.interrupt_at:
            self.interrupt_at = None
            raise KeyboardInterrupt
        self.calls.append(list(ids))
        sequence.ids += ids
        if logit_rows == "none":
            return np.empty((0, self.vocab_size), np.float32)
        logits = np.random.default_rng(sum(sequence.ids)).normal(size=(1, self.vocab_size)).astype(np.float32)
        logits[0, next(self.script)] += 10
        return logits


def text_of(run):
    return "".join(event.text for event in run)


def run_script(text, options=GREEDY, ctx_size=512, prompt="Hello there", **arguments):
    model = FakeModel(TOKENIZER.encode(text) + [2], ctx_size)
    return generate(model, TOKENIZER, model.new_sequence(), TOKENIZER.encode(prompt), options, **arguments)


# ---- one generation ----------------------------------------------------------------------------------------------
def test_end_token_ends_and_is_not_shown():
    run = run_script("a 😀 day.")
    events = list(run)
    assert "".join(event.text for event in events) == "a 😀 day." and run.finish_reason == "stop"
    assert [event.token for event in events] == run.tokens == TOKENIZER.encode("a 😀 day.")


def test_limits_are_told_apart():
    run = run_script("one two three", max_tokens=2)
    assert len(list(run)) == 2 and run.finish_reason == "length"
    run = run_script("one two three", max_tokens=0)
    assert list(run) == [] and run.finish_reason == "length"
    run = run_script("one two three four five six seven", ctx_size=8)
    list(run)
    assert run.finish_reason == "context" and len(run.cached) == 8


@pytest.mark.parametrize("room, cached", [(10, 0), (40, 32)])
def test_prompt_meets_a_cache_that_others_have_filled(room, cached):
    model = FakeModel([5])
    model.room = room
    sequence = model.new_sequence()
    run = generate(model, TOKENIZER, sequence, list(range(4, 54)), GREEDY)
    assert list(run) == [] and run.finish_reason == "context"
    assert run.cached == sequence.ids == list(range(4, 4 + cached))


def test_prompt_that_does_not_fit_or_is_empty():
    with pytest.raises(ValueError, match="no room in a context of 4"):
        run_script("x", ctx_size=4, prompt="a prompt of many more tokens than that")
    with pytest.raises(ValueError, match="prompt is empty"):
        run_script("x", prompt="")


def test_prompt_is_computed_in_chunks_and_can_be_cancelled():
    model = FakeModel([5])
    sequence = model.new_sequence()
    run, told = generate(model, TOKENIZER, sequence, list(range(4, 54)), GREEDY), []
    run.on_prompt = lambda done, total: told.append((done, total))
    run.cancel()
    assert text_of(run) == "" and run.finish_reason == "cancelled"
    assert model.calls == [list(range(4, 20))] and told == [(16, 50)] and run.cached == sequence.ids


def test_cancel_keeps_the_text_so_far():
    run, seen = run_script("one two three four"), ""
    for event in run:
        seen += event.text
        if len(run.tokens) == 2:
            run.cancel()
    assert run.finish_reason == "cancelled" and seen == TOKENIZER.decode(run.tokens) and len(run.tokens) == 3


def test_timings_count_every_token():
    run = run_script("one two three")
    list(run)
    assert run.timings.prompt_tokens == len(TOKENIZER.encode("Hello there")) and run.timings.first_token_s > 0
    assert len(run.timings.token_s) == len(run.tokens)  # the end token took its time too
    assert run.timings.tokens_per_second > 0 and run.timings.prompt_per_second > 0


# ---- sampling ----------------------------------------------------------------------------------------------------
def test_same_seed_same_output():
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)

    def draw(seed, n=30):
        sampler = Sampler(SamplerOptions(temperature=1.5, seed=seed), REFERENCE)
        return [sampler(logits, []) for _ in range(n)]
    assert draw(7) == draw(7) and draw(7) != draw(8)
    assert draw(None) != draw(None) and draw(-1) != draw(-1)


def test_unseeded_sampler_tells_its_seed():
    logits = np.random.default_rng(0).normal(size=500).astype(np.float32)
    first = Sampler(SamplerOptions(temperature=1.5), REFERENCE)
    again = Sampler(SamplerOptions(temperature=1.5, seed=first.seed), REFERENCE)
    assert [first(logits, []) for _ in range(20)] == [again(logits, []) for _ in range(20)]


def test_repeat_penalty_sees_only_the_last_tokens():
    logits = np.array([1.0, 2.0, 3.0], np.float32)

    def pick(last_n):
        return Sampler(SamplerOptions(temperature=0, repeat_penalty=9.0, repeat_last_n=last_n), REFERENCE)(logits, [2, 1, 1])
    assert (pick(0), pick(2), pick(3), pick(-1)) == (2, 2, 0, 0)


@pytest.mark.parametrize("wrong", [dict(top_p=0), dict(top_p=1.1), dict(min_p=-1), dict(top_k=-1), dict(repeat_penalty=0),
                                   dict(repeat_last_n=-2), dict(temperature=float("nan"))])
def test_options_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be .*, got"):
        SamplerOptions(**wrong)


# ---- stop strings ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stop", ["three", " th", "e t", "o th", "one"])
def test_stop_string_across_tokens(stop):
    text = "one two three four"
    run = run_script(text, stop=(stop,))
    assert text_of(run) == text[:text.index(stop)] and run.finish_reason == "stop"


def test_held_back_text_comes_out_when_it_was_no_stop():
    assert text_of(run_script("say ##", stop=("###",))) == "say ##"
    assert text_of(run_script("say ## x", stop=("###",), max_tokens=2)).startswith("say")


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab\n", max_size=20), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), data=st.data())
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    outputs = []
    for pieces in ([text], list(text), [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)])]):
        matcher, shown = StopStrings(tuple(stops)), ""
        for piece in pieces:
            shown += matcher.add(piece)
            assert not any(stop in shown for stop in stops)
            if matcher.hit:
                break
        outputs.append(shown + matcher.flush())
        assert matcher.hit == any(stop in text for stop in stops)
    assert outputs[0] == outputs[1] == outputs[2] and text.startswith(outputs[0])


# ---- conversations -----------------------------------------------------------------------------------------------
def conversation(script="Fine.", **arguments):
    model = FakeModel(TOKENIZER.encode(script) + [2], ubatch=64)
    return model, Conversation(model, TOKENIZER, GREEDY, **arguments)


def test_second_turn_computes_only_what_is_new():
    model, chat = conversation()
    assert text_of(chat.say("How are you?")) == "Fine."
    model.calls.clear()
    assert text_of(chat.say("And now?")) == "Fine."
    new = TOKENIZER.encode("<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n")
    assert model.calls[0] == new
    assert chat.last.timings.cached_tokens + len(new) == len(TOKENIZER.encode_chat(chat.messages[:3]))


def test_cleared_conversation_keeps_the_system_prompt():
    model, chat = conversation(system="Be brief.")
    text_of(chat.say("one"))
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    text_of(chat.say("one"))
    assert chat.last.timings.prompt_tokens < len(TOKENIZER.encode_chat(chat.messages[:2])) / 2


@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_interrupted_answer_leaves_a_consistent_cache(call):
    model, chat = conversation("one two three four")
    model.interrupt_at = call
    shown = ""
    with pytest.raises(KeyboardInterrupt):
        for event in chat.say("Count."):
            shown += event.text
    assert [m["content"] for m in chat.messages] == (["Count.", shown] if shown else [])
    text_of(chat.say("Again."))
    ids = TOKENIZER.encode_chat(chat.messages[:-1])
    assert chat._sequence.ids[:len(ids)] == ids and chat._cached == chat._sequence.ids


def test_abandoned_stream_is_like_an_interrupted_one():
    model, chat = conversation("one two three four")
    stream = chat.say("Count.")
    first = next(stream).text
    stream.close()
    assert chat.messages[-1] == {"role": "assistant", "content": first} and chat._cached == chat._sequence.ids


def test_conversation_that_outgrows_the_context():
    model, chat = conversation("one two three")
    model.ctx_size = 30
    text_of(chat.say("Count."))
    with pytest.raises(ValueError, match="/clear"):
        chat.say("and tell me a long story about it, with many many words in it please")
    assert len(chat.messages) == 2
    chat.clear()
    assert text_of(chat.say("Count."))
