"""Streaming text out, Ctrl-C, and figures for people."""
import signal
import sys
from contextlib import contextmanager

_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def plain(text: str, stream=None) -> str:
    """Text of others, which may want to steer a terminal: without control characters, unless `stream` is no terminal."""
    return text if stream is not None and not stream.isatty() else text.translate(_CONTROLS)


@contextmanager
def interruptible(cancel):
    """Inside, the first Ctrl-C calls `cancel`, a second one raises KeyboardInterrupt as usual."""
    def handler(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        cancel()
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def show(run, events) -> None:
    """Write the text of a Generation's events to stdout as they come, and a new line: to a pipe or file as it is."""
    if sys.stderr.isatty():
        run.on_prompt = _prompt_notes()
    for event in events:
        sys.stdout.write(plain(event.text, sys.stdout))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """What is going on, in a line of the terminal that the next note replaces; an empty one leaves the line free."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _prompt_notes():
    """An on_prompt for prompts of several chunks; a short one needs no note."""
    chunks = 0

    def tell(done, total):
        nonlocal chunks
        chunks += 1
        if done < total:
            note(f"reading the prompt: {done} of {total} tokens")
        elif chunks > 1:
            note("")
    return tell


def timing_line(run) -> str:
    """One line on how a generation went."""
    from edgeattn.generation import REASONS
    t = run.timings
    cached = f" ({t.cached_tokens} more from the cache)" if t.cached_tokens else ""
    return (f"prompt {t.prompt_tokens} tokens{cached}, first token after {t.first_token_s:.2f} s ({t.prompt_per_second:.0f} t/s) | "
            f"{len(run.tokens)} tokens at {t.tokens_per_second:.1f} t/s | ended: {REASONS.get(run.finish_reason, 'interrupted')}")


def status_line(model, tokens: int, run=None, counted=None) -> str:
    """How a chat stands: speed of the last answer, context, cache, and what sparse attention does with it.

    tokens   in the cache
    run      the last answer's Generation
    counted  what the scheduler had counted before that answer; None: nobody looked
    """
    speed = [f"{run.timings.tokens_per_second:.1f} t/s, first after {run.timings.first_token_s:.2f} s"] if run and run.tokens else []
    context = f"context {tokens:,} of {model.ctx_size:,}"
    cache = f"KV {model.cache.options.name} {size(model.cache.used_bytes)}"
    return " | ".join([*speed, context, cache, sparse_state(model, tokens, counted)])


def sparse_state(model, tokens: int, counted=None) -> str:
    """What sparse attention does at this length; counted: as in status_line."""
    scheduler = model.scheduler
    if scheduler is None:
        return "sparse attention off"
    from edgeattn.scheduler import HELD, NEVER
    if scheduler.min_len >= NEVER:
        return "sparse attention does not pay here"
    if tokens < scheduler.min_len:
        return f"sparse attention from {scheduler.min_len:,} tokens on"
    now = scheduler.counted() - (0 if counted is None else counted)
    return "sparse attention on" + (f": reads {scheduler.share_read(now):.0%}" if now[HELD] else "")


def tell_shift(run) -> None:
    """A line, if a Generation went on in spite of a full context."""
    if run.dropped > 0:
        print(f"the context was full: {run.dropped} tokens behind the first ones were forgotten, the rest was computed again",
              file=sys.stderr)


def size(number: float) -> str:
    """Bytes, readable."""
    for unit in ("B", "KiB", "MiB"):
        if abs(number) < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.2f} GiB"


def count(number: float) -> str:
    """A number of parameters, readable."""
    for unit in ("", " K", " M"):
        if number < 1000:
            return f"{number:.0f}" if not unit else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.2f} B"
