"""Progress on stderr: a bar in a terminal, a line now and then elsewhere."""
import sys
import time

CHECKING = "checking against the checkpoint, which compiles kernels once"


class Progress:
    """A context manager to call with (what, done, total). Nothing shows for work that is over within `patience` seconds."""

    def __init__(self, title: str, patience: float = 1.0):
        self._title, self._patience, self._started = title, patience, time.monotonic()
        self._bar = self._task = None
        self._said: set[str] = set()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._started < self._patience:
            return
        if not sys.stderr.isatty():
            self._say(self._title)
            return
        if self._bar is None:
            self._bar, self._task = _bar(self._title)
        self._bar.update(self._task, completed=done, total=total, what=what)

    def preparing(self, what: str, done: int, total: int) -> None:
        """What comes before an export's first byte."""
        self(what, done, total)
        if not sys.stderr.isatty():
            self._say(what)

    def exporting(self, done: int, total: int) -> None:
        """The progress of an export: bytes written; the check that follows takes its time too."""
        self("" if done < total else CHECKING, done, total)
        if done == total and not sys.stderr.isatty():
            self._say(CHECKING)

    def _say(self, text):
        if text not in self._said:
            print(f"{text} ...", file=sys.stderr, flush=True)
        self._said.add(text)


def _bar(title):
    from rich.console import Console
    from rich.progress import (BarColumn, Progress as Bar, TaskProgressColumn, TextColumn, TimeElapsedColumn,
                               TimeRemainingColumn)
    bar = Bar(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
              TimeRemainingColumn(), TextColumn("{task.fields[what]}", markup=False), console=Console(stderr=True), transient=True)
    bar.start()
    return bar, bar.add_task(title, total=None, what="")
