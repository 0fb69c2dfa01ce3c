"""An answer in a terminal, formatted while it comes: finished blocks stay, the last one and a status line are drawn anew."""
import os
import sys

from edgeattn.apps.markdown import Blocks
from edgeattn.apps.terminal import plain


def can_show() -> bool:
    """Whether stdout is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def show(run, events, status, console=None) -> None:
    """Print the text of a Generation's events as Markdown.

    status   () -> the line below the answer while it comes
    console  a rich Console; stdout by default
    """
    from rich.console import Console
    from rich.live import Live
    console, blocks, first = console or Console(highlight=False), Blocks(), True
    prompt = ""

    def reading(done, total):
        nonlocal prompt
        prompt = f"reading the prompt: {done:,} of {total:,} tokens" if done < total else ""
        live.refresh()

    def finish(texts):
        nonlocal first
        for text in texts:
            if not first:
                console.print()
            console.print(_markdown(text))
            first = False
    with Live(get_renderable=lambda: _Draft(blocks.tail, prompt or status(), first), console=console, transient=True,
              refresh_per_second=12, vertical_overflow="crop") as live:
        run.on_prompt = reading
        for event in events:
            finish(blocks.add(plain(event.text)))
    finish([blocks.tail.strip("\n")] if blocks.tail.strip() else [])
    if first:  # no text at all
        console.print()


def _markdown(text):
    from rich.markdown import Markdown
    return Markdown(text, hyperlinks=False)  # a link shows where it leads


class _Draft:
    """The end of the unfinished block, as much as the terminal has lines for, and the status line."""

    def __init__(self, tail, status, first):
        self._tail, self._status, self._first = tail, status, first

    def __rich_console__(self, console, options):
        from rich.segment import Segment
        from rich.text import Text
        lines = console.render_lines(_markdown(self._tail), options.update(height=None)) if self._tail.strip() else []
        if not self._first:
            yield Text()
        for line in lines[-max(1, console.size.height - 4):]:
            yield from line
            yield Segment.line()
        yield Text(self._status, style="dim", no_wrap=True, overflow="ellipsis")
