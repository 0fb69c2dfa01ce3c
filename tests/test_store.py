"""Conversations on disk: what was saved is there after a kill, a full disk, another program's save; a damaged file is left alone."""
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from edgeattn.apps.store import Changed, Store

TALK = [{"role": "user", "content": "Who was Napoleon?\nIn short, please."},
        {"role": "assistant", "content": "An emperor.", "facts": {"tokens": 3}}]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data/conversations.sqlite")


def again(store):
    return Store(store.path)


def test_what_is_saved_is_there_again(store):
    number, revision = store.save(TALK, "nano int4")
    more = [*TALK, {"role": "user", "content": "\udcff and \N{CHERRY BLOSSOM}"}]
    assert store.save(more, "nano int4", number, revision) == (number, revision + 1)
    found = again(store).load(number)
    assert found["messages"][:2] == TALK and found["messages"][2]["content"] == "? and \N{CHERRY BLOSSOM}"
    assert found["title"] == "Who was Napoleon? In short, please." and found["model"] == "nano int4"
    other, _ = store.save([{"role": "user", "content": "word " * 40}], "nano int4")
    assert [(c["id"], c["messages"]) for c in again(store).conversations()] == [(other, 1), (number, 3)]
    assert len(store.load(other)["title"]) <= 60
    assert os.stat(store.path).st_mode & 0o077 == 0


def test_an_edit_replaces_what_came_after(store):
    number, revision = store.save([*TALK, *TALK], "nano")
    edited = [*TALK, {"role": "user", "content": "And Wellington?"}]
    store.save(edited, "nano", number, revision)
    assert store.load(number)["messages"] == edited


def test_names(store):
    first, revision = store.save(TALK, "nano", title="War")
    second, _ = store.save(TALK, "nano", title="Warsaw")
    assert store.find("war") == first and store.find("wars") == store.find(str(second)) == second
    store.rename(first, " Peace\nand quiet ")
    assert store.load(first)["title"] == "Peace and quiet" and store.find("peace") == first
    store.save([], "nano", first, revision)  # a new name is no new revision
    for wrong in ("nothing", "", "99"):
        with pytest.raises(ValueError, match="no conversation"):
            store.find(wrong)
    with pytest.raises(ValueError, match="title is empty"):
        store.rename(first, " ")


def test_what_is_removed_is_gone_from_the_disk(store):
    number, _ = store.save([{"role": "user", "content": "my secret is 7391-xyzzy"}], "nano")
    kept, _ = store.save(TALK, "nano")
    store.remove(number)
    for path in store.path.parent.iterdir():
        assert b"7391-xyzzy" not in path.read_bytes(), path
    for wrong in (lambda: store.load(number), lambda: store.remove(number), lambda: store.rename(number, "x")):
        with pytest.raises(ValueError, match=f"no conversation {number}"):
            wrong()
    assert [c["id"] for c in store.conversations()] == [kept]
    assert store.save(TALK, "nano")[0] > kept


def test_two_programs_do_not_overwrite_each_other(store):
    number, revision = store.save(TALK, "nano")
    other = again(store)
    other.save([*TALK, *TALK], "nano", number, revision)
    with pytest.raises(Changed):
        store.save([], "nano", number, revision)
    assert len(store.load(number)["messages"]) == 4
    other.remove(number)
    with pytest.raises(Changed):
        store.save(TALK, "nano", number, revision + 1)
    assert store.conversations() == []


def test_threads_and_processes_save_at_once(store):
    stores = [store, again(store)]
    failed = []

    def write(i):
        try:
            for turn in range(10):
                stores[i % 2].save(TALK, f"thread {i}")
        except Exception as error:
            failed.append(error)
    threads = [threading.Thread(target=write, args=(i,)) for i in range(6)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not failed and len(store.conversations()) == 60


WRITER = """
import sys
from edgeattn.apps.store import Store
store, messages, state = Store(sys.argv[1]), [], (None, None)
while True:
    messages += [{"role": "user", "content": f"question {len(messages)} " * 50}, {"role": "assistant", "content": "answer " * 200}]
    state = store.save(messages, "nano", *state)
    print(len(messages), flush=True)
"""


def test_a_kill_loses_nothing_that_was_saved(store):
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(store.path)], stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    told = [int(line) for line in child.stdout.read().split() if line] or [40]
    child.wait()
    opened = again(store)
    messages = opened.load(opened.conversations()[0]["id"])["messages"]
    assert len(messages) - told[-1] in (0, 2)  # the kill may have come between a save and its line
    assert messages[-1]["role"] == "assistant"


def test_a_full_disk_is_told_and_loses_nothing_else(store):
    number, revision = store.save(TALK, "nano")
    pages = store._base.execute("PRAGMA page_count").fetchone()[0]
    store._base.execute(f"PRAGMA max_page_count = {pages + 1}")
    long = [*TALK, {"role": "user", "content": "x" * 100_000}]
    with pytest.raises(OSError, match="full"):
        store.save(long, "nano", number, revision)
    assert store.load(number)["messages"] == TALK
    store._base.execute("PRAGMA max_page_count = 100000")
    store.save(long, "nano", number, revision)
    assert again(store).load(number)["messages"] == long


@pytest.mark.parametrize("what", ["notes", "header", "page", "foreign", "newer"])
def test_a_file_that_is_damaged_or_not_ours_is_left_alone(store, what):
    store.save([{"role": "user", "content": "x" * 50_000}], "nano")
    store.close()
    path, why = store.path, "damaged"
    good = path.read_bytes()
    if what == "notes":
        path.write_text("my notes\n" * 1000)
    elif what == "header":
        path.write_bytes(good[:40] + b"\xff" * 60 + good[100:])
    elif what == "page":
        path.write_bytes(good[:4096] + b"\xa5" * 4096 + good[8192:])
    else:
        path.unlink() if what == "foreign" else None
        base, why = sqlite3.connect(path), "another program" if what == "foreign" else "newer edgeattn"
        base.execute("CREATE TABLE theirs(x)" if what == "foreign" else "PRAGMA user_version = 9")
        base.commit(), base.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=why) as found:
        Store(path)
    assert path.read_bytes() == before and "\n" not in str(found.value) and str(path) in str(found.value)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file/x.sqlite"):
        with pytest.raises(OSError):
            Store(path)
