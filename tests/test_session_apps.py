"""--session and `edgeattn session` as a user meets them."""
import os
import re

import pytest

from edgeattn.cache import session
from edgeattn.cache.session_file import SessionError


@pytest.fixture
def chat(edgeattn, nano_int4):
    def run(stdin, *arguments):
        return edgeattn("chat", "-m", nano_int4, "-c", 1024, "-n", 24, "-s", 7, *arguments, stdin=stdin)
    return run


@pytest.mark.parametrize("settings", [(), ("-ctk", "int4", "-ctv", "int4", "--kv-window", 32), ("--kv-budget", "2M")])
def test_chat_goes_on_as_if_it_had_never_ended(chat, settings, tmp_path):
    questions = ["What is the capital of France? " * 12, "And of Italy?", "Tell me more."]
    unbroken = chat("\n".join(questions), *settings)
    parts = [chat(question, "--session", tmp_path / "x", *settings) for question in questions]
    assert "".join(part.stdout for part in parts) == unbroken.stdout and unbroken.stdout.count("\n") == 3
    assert parts[0].stderr == ""
    for before, part in zip((2, 4), parts[1:]):
        found = re.fullmatch(rf"session \S+/x: {before} messages, (\d+) tokens in the cache\n"
                             r"session: (\d+) of (\d+) tokens reused, \d+ computed\n", part.stderr)
        assert found[1] == found[3] and int(found[2]) > 100


def test_what_was_reused_is_what_the_cache_could_keep(chat, tmp_path):
    tight = ("--session", tmp_path / "x", "--kv-budget", "2M")
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
                                   (good, ("-c", 16), "raise -c")):
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
    path, save, written = tmp_path / "x", session.save, []

    def meanwhile(where, *arguments):
        save(where, *arguments)
        written.append(path.read_bytes())
        path.write_bytes(b"someone else's")
    monkeypatch.setattr(session, "save", meanwhile)
    done = chat("hi\nand\nso\n", "--session", path)
    assert done.stderr.count("changed by another program") == 0 or path.read_bytes() == b"someone else's"
    assert len(written) >= 1


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
    assert issubclass(SessionError, ValueError)
