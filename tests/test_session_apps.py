"""Conversations that go on from a file: in Python, with --session, and `edgeattn session`."""
import os
import re

import pytest

from edgeattn.apps.session import SessionFile
from edgeattn.cache import session
from edgeattn.cache.options import CacheOptions
from edgeattn.conversation import Conversation
from edgeattn.generation import SamplerOptions
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer


BUDGET = ("--kv-budget", "1500K", "-ctk", "f16", "-ctv", "f16")  # some 250 tokens


@pytest.fixture
def chat(edgeattn, nano_int4):
    def run(stdin, *arguments):
        return edgeattn("chat", "-m", nano_int4, "-c", 1024, "-n", 24, "-s", 7, *arguments, stdin=stdin)
    return run


def test_a_conversation_goes_on_where_it_was(nano_int4, tmp_path):
    tokenizer, path = Tokenizer(nano_int4), tmp_path / "session"
    questions = ["Who was Napoleon?", "When did he die?", "And where?"]

    def talk(conversation, some):
        for question in some:
            assert list(conversation.say(question)) is not None
        return conversation

    def fresh(seed=None, **more):
        return Conversation(
            Model.load(nano_int4, cache=CacheOptions("int4", "int4"), ctx_size=1024), tokenizer,
            SamplerOptions(seed=seed), max_tokens=30, **more)
    unbroken = talk(fresh(11, system="Be brief."), questions[:2])
    unbroken.save(path)
    talk(unbroken, questions[2:])
    for seed in (11, None, -1):
        restored = fresh(seed)
        restored.restore(path)
        cached = restored.tokens
        assert talk(restored, questions[2:]).messages == unbroken.messages
        assert restored.last.tokens == unbroken.last.tokens and restored.last.timings.cached_tokens == cached > 40
    other = fresh(12, system="Be wordy.")
    other.restore(path)
    assert [m["content"] for m in other.messages[:2]] == ["Be wordy.", questions[0]]
    assert talk(other, questions[2:]).last.seed == 12 and other.last.timings.cached_tokens < cached
    other.clear()
    assert other.messages == [{"role": "system", "content": "Be wordy."}]
    model = other._model
    for messages, sampler, why in ((None, {}, "a text"), ([{"role": "user"}], {}, "messages"), ("hi", {}, "messages"),
                                   ([{"role": 1, "content": ""}], {}, "messages"), ([], {}, "sampler"), ([], 7, "sampler"),
                                   ([], {"seed": 12, "random": {"bit_generator": "PCG64", "state": {"state": 1 << 200}}}, "sampler")):
        sequence = model.new_sequence()
        model.forward([(sequence, [5, 6, 7])])
        session.save(path, model.cache, sequence, [5, 6, 7], model.config, {"messages": messages, "sampler": sampler})
        model.free(sequence)
        used = model.cache.pools[0].used
        with pytest.raises(ValueError, match=why):
            other.restore(path)
        assert model.cache.pools[0].used == used and len(other.messages) == 1


@pytest.mark.parametrize("settings", [(), ("-ctk", "int4", "-ctv", "int4", "--kv-window", 32), BUDGET])
def test_chat_goes_on_as_if_it_had_never_ended(chat, settings, tmp_path):
    questions = ["What is the capital of France? " * 60, "And of Italy?", "Tell me more."]
    unbroken = chat("\n".join(questions), *settings)
    parts = [chat(question, "--session", tmp_path / "x", *settings) for question in questions]
    assert "".join(part.stdout for part in parts) == unbroken.stdout
    assert parts[0].stderr == ""
    for before, part in zip((2, 4), parts[1:]):
        found = re.fullmatch(rf"session \S+/x: {before} messages, (\d+) tokens in the cache\n"
                             r"session: (\d+) of (\d+) tokens reused, \d+ computed\n", part.stderr)
        assert found[1] == found[3] and int(found[2]) > 100


def test_what_was_reused_is_what_the_cache_could_keep(chat, tmp_path):
    tight = ("--session", tmp_path / "x", *BUDGET)
    chat("One two three four five. " * 60, *tight)
    done = chat("/clear\nhi", *tight)  # the tokens before were evicted: they cannot be cut off, so all is computed again
    assert re.search(r"session: 0 of \d{3,} tokens reused, \d+ computed", done.stderr)


def test_clear_is_saved_and_nothing_new_is_not(chat, tmp_path):
    path = tmp_path / "x"
    assert chat("/stats\n", "--session", path).returncode == 0 and not path.exists()
    chat("hi", "--session", path)
    before = path.stat().st_mtime_ns
    chat("/stats\n", "--session", path)
    assert path.stat().st_mtime_ns == before
    chat("/clear\n", "--session", path)
    assert "0 messages" in chat("/stats\n", "--session", path).stderr


def test_generate_goes_on(edgeattn, nano_int4, tmp_path):
    def run(count, *arguments):
        return edgeattn("generate", "-m", nano_int4, "-c", 512, "-n", count, "-s", 3, *arguments)
    kept = ("--session", tmp_path / "x")
    whole, parts = run(24, "-p", "The king said"), [run(12, "-p", "The king said", *kept), run(12, *kept)]
    assert "".join(part.stdout.removesuffix("\n") for part in parts) == whole.stdout.removesuffix("\n")
    again = run(12, "-p", "The king said", *kept)  # the same prompt and seed: the same text, and nothing to read but the last token
    assert again.stdout == parts[0].stdout and re.search(r"session: \d+ of \d+ tokens reused, 1 computed", again.stderr)
    assert "text:\nThe king said" + again.stdout.strip() in edgeattn("session", "show", tmp_path / "x").stdout
    assert "no session to go on with" not in again.stderr
    (tmp_path / "bad").write_text("notes")
    assert "not continued" in run(1, "--session", tmp_path / "bad").stderr and (tmp_path / "bad").read_text() == "notes"
    assert "a text of `edgeattn generate`" in edgeattn("chat", "-m", nano_int4, "-c", 512, *kept).stderr


def test_a_file_that_cannot_be_continued_is_left_alone(chat, tmp_path):
    path, other = tmp_path / "x", tmp_path / "other"
    chat("hi", "--session", path)
    good = path.read_bytes()
    for content, settings, why in ((good[:-100], (), "damaged"), (b"my notes", (), "not a session"), (good, ("-ctk", "int4"), "k_type f16"),
                                   (good, ("-c", 16, "-n", 1), "raise -c")):
        path.write_bytes(content)
        done = chat("hi", "--session", path, *settings)
        assert done.returncode == 0 and done.stdout.count("\n") == 1 and path.read_bytes() == content
        assert done.stderr.count("\n") == 1 and why in done.stderr and "nothing more is saved" in done.stderr
    other.mkdir()
    assert "not a session" in chat("hi", "--session", other).stderr
    assert os.listdir(other) == [] and sorted(os.listdir(tmp_path)) == ["other", "x"]


def test_a_save_that_fails_does_not_end_the_chat(chat, tmp_path, monkeypatch):
    path = tmp_path / "x"
    chat("hi", "--session", path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        done = chat("hi\nand\n", "--session", path)
    assert done.returncode == 0 and done.stdout.count("\n") == 2 and path.read_bytes() == before
    told = [line for line in done.stderr.splitlines() if "not saved" in line]
    assert told == [f"session {path}: not saved: No space left on device"] * 3  # after both answers, and on leaving
    assert os.listdir(tmp_path) == ["x"]


def test_another_program_s_session_is_not_overwritten(chat, tmp_path, monkeypatch):
    path, answers = tmp_path / "x", []

    def meanwhile(self, timings):
        answers.append(timings)
        if len(answers) == 2:
            path.write_bytes(b"another's")
    monkeypatch.setattr(SessionFile, "tell_reuse", meanwhile)
    done = chat("hi\nand\nso\n", "--session", path)
    assert done.returncode == 0 and len(answers) == 3 and path.read_bytes() == b"another's"
    assert done.stderr.count("\n") == 1 and "was changed by another program" in done.stderr


def test_session_list_show_rm(edgeattn, chat, nano_int4, tmp_path):
    assert "no sessions" in edgeattn("session", "list", tmp_path).stderr
    path = tmp_path / "x.session"
    chat("Hello there.", "--session", path, "-sys", "Be brief.")
    edgeattn("generate", "-m", nano_int4, "-p", "The king", "-n", 8, "--session", tmp_path / "text", "-ctk", "int4", "-ctv", "int2")
    (tmp_path / "notes").write_text("no session")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    lines = edgeattn("session", "list", tmp_path).stdout.splitlines()
    assert re.fullmatch(r"file +model +tokens +KV cache +size +date", lines[0]) and len(lines) == 3
    assert re.fullmatch(r"text +nano int4 +\d+ +int4/int2 kivi +[\d.]+ KiB +\d{4}-\S+", lines[1])
    assert re.fullmatch(r"x.session +nano int4 +\d+ +f16 +[\d.]+ KiB +\d{4}-\S+", lines[2])
    shown = edgeattn("session", "show", path)
    assert shown.returncode == 0 and "state      complete" in shown.stdout
    assert "\nsystem:\nBe brief.\n\nuser:\nHello there.\n\nassistant:\n" in shown.stdout
    path.write_bytes(path.read_bytes()[:-1])
    shown = edgeattn("session", "show", path)
    assert shown.returncode == 1 and "state      damaged" in shown.stdout and "Hello there." in shown.stdout
    for name in ("notes", "folder", "pipe"):
        assert "not a session file" in edgeattn.fails("session", "rm", tmp_path / name) and (tmp_path / name).exists()
    assert edgeattn("session", "rm", path).returncode == 0 and not path.exists()
    assert "No such file" in edgeattn.fails("session", "rm", path) and "No such file" in edgeattn.fails("session", "show", path)
    assert "no such folder" in edgeattn.fails("chat", "-m", nano_int4, "--session", tmp_path / "no" / "x")
