"""What edgeattn chat obeys, keeps and shows: / commands, several lines, kept conversations, Markdown in a terminal."""
import io
import os
import re
import signal
import subprocess
import termios
import time
from types import SimpleNamespace

import pytest

from edgeattn.apps import chat_input, markdown_view
from edgeattn.apps.store import Store
from edgeattn.generation import Event

from command import EDGEATTN
from test_chat import Terminal


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return Store()


@pytest.fixture
def chat(edgeattn, nano_int4, store):
    def run(*lines, more=("-n", 6)):
        return edgeattn("chat", "-m", nano_int4, "-c", 1024, "--temp", 0, *more, stdin="\n".join(lines))
    return run


def messages(store, number=None):
    return [m["content"] for m in store.load(number or store.conversations()[0]["id"])["messages"]]


def test_a_chat_is_kept_and_gone_on_with(chat, store):
    said = chat("Who was Napoleon?", "/save War", "And then?", "/regen")
    assert "kept as conversation 1" in said.stderr and said.stdout.count("\n") == 3
    assert messages(store)[::2] == ["Who was Napoleon?", "And then?"] and messages(store)[3] == said.stdout.splitlines()[2]
    listed = chat("/load", "/load war", "When?", "/load nothing")
    assert re.search(r"1  \d{4}-\d\d-\d\d  War \(4 messages\)", listed.stderr) and "no conversation 'nothing'" in listed.stderr
    assert messages(store, 1)[::2] == ["Who was Napoleon?", "And then?", "When?"]
    chat("/load 1", "/clear", "Another?")
    assert [c["messages"] for c in store.conversations()] == [2, 6]
    assert "Traceback" not in said.stderr + listed.stderr


def test_a_pipe_keeps_nothing_unless_it_is_told_to(chat, store):
    chat("hi")
    assert store.conversations() == []
    chat("hi", more=("-n", 4, "--save"))
    assert messages(store)[0] == "hi"


def test_what_is_loaded_answers_as_if_it_had_never_ended(chat):
    unbroken = chat("Who was Napoleon?", "When did he die?").stdout
    first = chat("Who was Napoleon?", "/save")
    assert first.stdout + chat("/load 1", "When did he die?").stdout == unbroken


def test_cache_and_sparse_attention_change(chat):
    done = chat("hi", "/kv", "/kv int8/int4", "/kv 3M", "/kv -ctk f16 -ctv f16 --kv-eviction streaming_llm", "/kv --kv-bits=4",
                "/kv default", "/kv 9x", "/kv -ctk x", "/kv \"", "/sparse", "/sparse quest 256", "/sparse off", "/sparse nothing", "so")
    assert done.returncode == 0 and done.stdout.count("\n") == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("the conversation is read again")]
    caches = [line.split(",")[0] for line in said if line.startswith("cache ")]
    assert caches == ["cache f16", "cache int8/int4", "cache int8/int4", "cache f16", "cache int4", "cache f16"]
    assert "evicts by streaming_llm" in done.stderr
    for text in ("'9x' is no type", "invalid choice: 'x'", "No closing quotation", "got 'nothing'", "method quest", "sparse attention off"):
        assert text in done.stderr, text


def test_the_system_prompt_changes(chat, store):
    done = chat("/system", "/system Be brief.", "/system", "hi", "/save", "/system none", "so", more=("-n", 4))
    assert [line for line in done.stderr.splitlines() if "system" in line or "Be" in line] == [
        "no system prompt", "Be brief.", "no system prompt from the next question on"]
    assert messages(store)[0] == "hi" and len(messages(store)) == 4


def test_a_session_is_opened_and_left(chat, tmp_path):
    done = chat("hi", f"/session {tmp_path / 'a'}", "/session", "/kv int4", "/session", "so", f"/session {tmp_path / 'no/a'}")
    assert (tmp_path / "a").exists() and f"session {tmp_path / 'a'} is left as it is" in done.stderr
    assert "no session file" in done.stderr and "no such folder" in done.stderr
    assert "2 messages" in chat(f"/session {tmp_path / 'a'}").stderr


def test_several_lines_between_quotes():
    def read(text):
        return list(chat_input.piped(io.StringIO(text)))
    assert read('one\n"""two\nthree"""\nfour') == ["one", "two\nthree", "four"]
    assert read('"""\ntwo\n\nthree\n"""\n"""x"""\n"""open\nend') == ["two\n\nthree", "x", "open\nend"]
    assert read("a\\\nb\n\n") == ["a\\", "b", ""]  # a line of a pipe is a turn
    assert chat_input.open_ended("a\\") and chat_input.open_ended('"""') and chat_input.open_ended('"""a\nb')
    assert not chat_input.open_ended('"""a\nb"""') and not chat_input.open_ended('say """')
    assert chat_input.joined("a\\\nb") == "a\nb"


def test_a_full_disk_is_told_once_and_the_chat_goes_on(chat, store, monkeypatch):
    def full(self, *arguments, **more):
        raise OSError(f"{self.path}: database or disk is full")
    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", full)
        done = chat("hi", "so", more=("-n", 4, "--save"))
    assert done.returncode == 0 and done.stdout.count("\n") == 2
    assert [line for line in done.stderr.splitlines() if "not kept" in line] == [f"not kept: {store.path}: database or disk is full"]


def test_a_damaged_store_is_told_and_left_alone(chat, store):
    store.close()
    store.path.write_text("my notes\n" * 500)
    done = chat("hi", "/load", more=("-n", 4, "--save"))
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and store.path.read_text() == "my notes\n" * 500
    assert "not kept: " in done.stderr and "damaged" in done.stderr


def test_a_kill_loses_at_most_the_unfinished_answer(nano_int4, store):
    options = ["-m", str(nano_int4), "-c", "2048", "-t", "1", "-s", "1", "--temp", "2", "--top-k", "0", "--top-p", "1", "--min-p", "0"]
    child = subprocess.Popen([*EDGEATTN, "chat", "--save", *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"XDG_DATA_HOME": str(store.path.parent.parent)})
    child.stdin.write("Say a word.\nTell me everything.\nThen more.\n")
    child.stdin.flush()
    end = time.monotonic() + 100
    while not store.conversations() or messages(store)[-1] != "Tell me everything.":
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    left = messages(Store())
    assert left[0] == "Say a word." and left[2] == "Tell me everything." and len(left) == 3


# ---- in a terminal -------------------------------------------------------------------------------------------------
def test_markdown_is_drawn_and_its_status_line_goes():
    from rich.console import Console
    text = "# Mills\n\nThe **old** one.\n\n```python\nprint(1)\n```\n\x1b]0;evil\x07last [a](http://b.c)"
    out, run = io.StringIO(), SimpleNamespace(on_prompt=None)
    console = Console(file=out, force_terminal=True, width=60, height=20, color_system="standard")
    markdown_view.show(run, [Event(1, text[i:i + 3]) for i in range(0, len(text), 3)], lambda: "9.9 t/s", console)
    shown = out.getvalue()
    assert "\x1b[1mold" in shown and "**" not in shown and "\x1b]0;" not in shown and "http://b.c" in shown
    assert "9.9 t/s" not in shown.rsplit("\x1b[2K", 1)[-1] and shown.endswith("\n")


def test_a_terminal_takes_several_lines_and_shows_how_it_stands(nano_int4, store):
    screen = Terminal("chat", "-m", nano_int4, "-c", 2048, "-n", 6, "--temp", 0, home=store.path.parent.parent, term="xterm-256color")
    termios.tcsetwinsize(screen._master, (30, 140))
    try:
        screen.expect("kept on this machine")
        screen.expect("\x1b[6n")
        screen.send("\x1b[3;1R")  # where the cursor is, as a terminal answers
        screen.expect("context 0 of 2,048")
        screen.send("first line\x1b\rsecond line\r")
        screen.expect("t/s, first after")
        screen.send("/exit\r")
        assert screen.wait() == 0
    finally:
        screen.process.kill()
    kept = Store(store.path.parent.parent / "data/edgeattn/conversations.sqlite")
    assert messages(kept)[0] == "first line\nsecond line"
