"""Conversations kept on disk: one SQLite file, shared by the web page and `edgeattn chat`."""
import json
import os
import sqlite3
import sys
import threading
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

UNREADABLE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR)  # not the file's fault
MARK, VERSION = 0x65647374, 1  # application_id and user_version of our files
TITLE = 60  # characters of a title that is made from the first question
TABLES = """
CREATE TABLE conversations(id INTEGER PRIMARY KEY AUTOINCREMENT, title TEXT NOT NULL, model TEXT NOT NULL,
                           created TEXT NOT NULL, updated TEXT NOT NULL, revision INTEGER NOT NULL);
CREATE TABLE messages(conversation INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE, position INTEGER NOT NULL,
                      role TEXT NOT NULL, content TEXT NOT NULL, facts TEXT NOT NULL, PRIMARY KEY(conversation, position));
"""


def data_folder() -> Path:
    """Where conversations are kept."""
    if os.environ.get("XDG_DATA_HOME"):
        return Path(os.environ["XDG_DATA_HOME"]) / "edgeattn"
    return Path.home() / ("Library/Application Support" if sys.platform == "darwin" else ".local/share") / "edgeattn"


class Changed(ValueError):
    """Another program has saved the conversation meanwhile, or removed it."""


class Missing(Changed):
    """There is no such conversation, or not any more."""


class Store:
    """Conversations, each a list of messages {"role", "content"} and, where there are any, "facts": a dict that nothing here reads.

    A save is one transaction, on the disk when it returns. Any thread may call. OSError: the disk is full or cannot be written;
    nothing was saved then, what was there before still is, and the next save may work again.
    """

    def __init__(self, path: str | Path | None = None):
        """path: the user's file by default; made, readable by the user only, unless it is there. ValueError: a damaged file, or not one
        of ours; it stays as it is."""
        self.path, self._lock = Path(path or data_folder() / "conversations.sqlite"), threading.RLock()
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # a folder or a foreign file is told as such
        if self.path.stat().st_size:
            self._check()
        with self._told():
            self._base = _connect(self.path)
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")     # also when the power fails
            self._base.execute("PRAGMA foreign_keys = ON")
            self._base.execute("PRAGMA secure_delete = ON")     # what is removed is not there to be found
        with self._change() as base:
            if base.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in TABLES.split(";"):  # not executescript, which commits on its own
                    base.execute(statement)
                base.execute(f"PRAGMA application_id = {MARK}")
                base.execute(f"PRAGMA user_version = {VERSION}")

    def _check(self):
        """Reads only, so that a file that is not ours is not touched."""
        try:
            base = _connect(self.path)
            try:
                mark, version = (base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
                found = base.execute("PRAGMA quick_check(1)").fetchone()[0]
                empty = not base.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            finally:
                base.close()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xff in UNREADABLE:
                raise OSError(f"{self.path}: {error}") from None
            mark, version, found, empty = MARK, VERSION, str(error), False
        if empty and not version:  # a first start that was ended before it was over
            return
        if found != "ok":
            raise ValueError(f"{self.path}: damaged, and left as it is: {' '.join(found.split())}; move it away to start a new one")
        if mark != MARK:
            raise ValueError(f"{self.path}: a database of another program; move it away")
        if version > VERSION:
            raise ValueError(f"{self.path}: made by a newer edgeattn (format {version}, this one knows {VERSION}); update edgeattn")

    def close(self) -> None:
        with self._lock:
            self._base.close()

    # ---- reading ------------------------------------------------------------------------------------------------
    def conversations(self) -> list[dict]:
        """[{"id", "title", "model", "created", "updated", "messages": how many}], the newest first."""
        return self._rows("SELECT id, title, model, created, updated, (SELECT count(*) FROM messages WHERE conversation = id) AS messages "
                          "FROM conversations ORDER BY updated DESC, id DESC")

    def load(self, number: int) -> dict:
        """{"id", "title", "model", "created", "updated", "revision", "messages": [...]}; Missing: there is none."""
        with self._lock:
            found = self._rows("SELECT * FROM conversations WHERE id = ?", number)
            rows = self._rows("SELECT role, content, facts FROM messages WHERE conversation = ? ORDER BY position", number)
        if not found:
            raise Missing(f"there is no conversation {number}")
        return found[0] | {"messages": [_message(row) for row in rows]}

    def find(self, name: str) -> int:
        """The conversation that a user means by its number or title, or by the start of one; the newest of several. ValueError: none."""
        known, wanted = self.conversations(), name.strip().lower()
        for same in (lambda one: wanted in (str(one["id"]), one["title"].lower()), lambda one: one["title"].lower().startswith(wanted)):
            if wanted and (found := next(filter(same, known), None)):
                return found["id"]
        raise ValueError(f"there is no conversation {name!r}")

    # ---- writing ------------------------------------------------------------------------------------------------
    def save(self, messages: list[dict], model: str, number: int | None = None, revision: int | None = None,
             title: str | None = None) -> tuple[int, int]:
        """Make a conversation's messages these -> (its number, its revision), for the next save.

        number, revision  of what this one goes on from; None starts a new one
        title             None: as it was, or else from the first question
        Changed: it is not at that revision any more, Missing: not there any more; nothing was saved
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        with self._change() as base:
            if number is None:
                made = base.execute("INSERT INTO conversations(title, model, created, updated, revision) VALUES (?, ?, ?, ?, 0)",
                                    (_utf8(title or _title(messages)), model, now, now))
                number, revision, held = made.lastrowid, 0, []
            else:
                changed = base.execute("UPDATE conversations SET model = ?, updated = ?, title = coalesce(?, title) WHERE id = ? AND "
                                       "revision = ?", (model, now, title and _utf8(title), number, revision))
                if not changed.rowcount:
                    if not base.execute("SELECT 1 FROM conversations WHERE id = ?", (number,)).fetchone():
                        raise Missing(f"conversation {number} was removed by another program")
                    raise Changed(f"conversation {number} was changed by another program")
                held = base.execute("SELECT role, content, facts FROM messages WHERE conversation = ? ORDER BY position",
                                    (number,)).fetchall()
            rows = [(_utf8(m["role"]), _utf8(m["content"]), json.dumps(m.get("facts", {}))) for m in messages]
            same = next((i for i, (a, b) in enumerate(zip(rows, held)) if a != tuple(b)), min(len(rows), len(held)))
            base.execute("DELETE FROM messages WHERE conversation = ? AND position >= ?", (number, same))
            base.executemany("INSERT INTO messages VALUES (?, ?, ?, ?, ?)", [(number, i, *rows[i]) for i in range(same, len(rows))])
            base.execute("UPDATE conversations SET revision = revision + 1 WHERE id = ?", (number,))
            return number, revision + 1

    def rename(self, number: int, title: str) -> None:
        """ValueError: no title; Missing: there is no such conversation."""
        if not title.strip():
            raise ValueError("the title is empty")
        with self._change() as base:
            if not base.execute("UPDATE conversations SET title = ? WHERE id = ?", (_utf8(" ".join(title.split())), number)).rowcount:
                raise Missing(f"there is no conversation {number}")

    def remove(self, number: int) -> None:
        """Missing: there is none. Its text is gone from the disk too."""
        with self._change() as base:
            if not base.execute("DELETE FROM conversations WHERE id = ?", (number,)).rowcount:
                raise Missing(f"there is no conversation {number}")
        with self._lock, self._told():
            self._base.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    # ---- SQLite -------------------------------------------------------------------------------------------------
    def _rows(self, query, *values):
        with self._lock, self._told():
            return [dict(row) for row in self._base.execute(query, values)]

    @contextmanager
    def _change(self):
        """A transaction of its own; nothing is changed if it fails."""
        with self._lock, self._told():
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
                self._base.execute("COMMIT")
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise

    @contextmanager
    def _told(self):
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: {error}") from None


def _connect(path):
    base = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
    base.row_factory = sqlite3.Row
    return base


def _message(row):
    facts = json.loads(row["facts"])
    return {"role": row["role"], "content": row["content"]} | ({"facts": facts} if facts else {})


def _title(messages):
    """The start of the first question, in one line."""
    words = " ".join(next((m["content"] for m in messages if m["role"] == "user"), "").split()[:TITLE])
    return (words if len(words) <= TITLE else words[:TITLE - 3].rsplit(" ", 1)[0] + "...") or "(empty)"


def _utf8(text):
    """SQLite takes no lone surrogates, which bytes of a command line become that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()
