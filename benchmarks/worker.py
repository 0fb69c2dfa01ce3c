"""One engine in a process of its own, driven by lines of JSON; started by peers.py.

prepare ENGINE CHECKPOINT FOLDER DEVICE      build the engine's model file if it is not there; print what it is
run     ENGINE PATH CONTEXT THREADS DEVICE   load it, then answer requests {"do": ..., ...}, one a line
An engine is a module engine_NAME.py with `REQUIRES`, `prepare` and `Engine` (forward, truncate, and fill where it can hold tokens
without computing them). ENGINE is its name, or NAME:VARIANT.
"""
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
CHUNK = 512  # the cache is filled in pieces of this many tokens, the same for every engine


def memory_bytes() -> dict[str, int]:
    """This process: peak resident bytes, and what of the present ones is mapped from files or anonymous."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) * 1024 for name, key in
            (("peak", "VmHWM"), ("mapped", "RssFile"), ("anonymous", "RssAnon"))}


class Runner:
    """Timed calls on one engine. Tokens come from a small generator of our own: every engine sees the same ones."""

    def __init__(self, name: str, path: str, context: int, threads: int, device: str):
        start = time.perf_counter()
        name, _, variant = name.partition(":")
        self.engine = importlib.import_module(f"engine_{name}").Engine(path, context, threads, variant, device)
        loaded = time.perf_counter()
        self.vocab, self.state, self.length = 256, 1, 0
        self._forward(1)
        self.info = {"version": self.engine.version, "settings": self.engine.settings, "load_s": loaded - start,
                     "first_token_s": time.perf_counter() - loaded, "loaded": memory_bytes()}

    def start(self, vocab: int) -> dict:
        self.vocab = vocab
        return self.info

    def _tokens(self, count):
        tokens = []
        for _ in range(count):
            self.state = (self.state * 1103515245 + 12345) % 2**31
            tokens.append((self.state >> 8) % self.vocab)
        return tokens

    def _forward(self, count):
        """Append `count` tokens in one call; its seconds."""
        tokens = self._tokens(count)
        start = time.perf_counter()
        self.engine.forward(tokens)
        self.length += count
        return time.perf_counter() - start

    def fill(self, depth: int) -> None:
        """Hold `depth` tokens."""
        if hasattr(self.engine, "fill"):
            self.engine.fill(depth)
            self.length = depth

    def _set_length(self, length):
        if length < self.length:
            self.engine.truncate(length)
            self.length = length
        while self.length < length:
            self._forward(min(CHUNK, length - self.length))

    def prefill(self, depth: int, tokens: int) -> list[float]:
        """Seconds of one prompt of `tokens` after `depth` others, its last token's logits included."""
        self._set_length(depth)
        return [self._forward(tokens)]

    def prompts(self, lengths: list[int]) -> list[dict]:
        """Of prompts of each length, ascending: {"tokens", "seconds" until the last token's logits, "read": the part of the pairs that
        attention read}. An engine with `reads` is given each of them in one call; of others the longest is read, in pieces, and timed at
        each length."""
        rows, spent = [], 0.0
        self._set_length(0)
        for tokens in lengths:
            if hasattr(self.engine, "reads"):
                self._set_length(0)
                self.engine.reads()
                spent = self._forward(tokens)
                rows.append({"tokens": tokens, "seconds": spent, "read": self.engine.reads()})
                continue
            while self.length < tokens:
                spent += self._forward(min(CHUNK, tokens - self.length))
            rows.append({"tokens": tokens, "seconds": spent, "read": 1.0})
        return rows

    def decode(self, depth: int, tokens: int) -> list[float]:
        """Seconds of each of `tokens` tokens, one at a time, the first of them after `depth` others."""
        self._set_length(depth)
        return [self._forward(1) for _ in range(tokens)]

    def memory(self) -> dict:
        """Resident bytes, and the engine's own account of them if it keeps one."""
        resident = memory_bytes()
        return resident | {"parts": self.engine.memory_parts() if hasattr(self.engine, "memory_parts") else {}}


class StreamRunner:
    """The same for the stream-read bandwidth."""

    def __init__(self, threads: int, device: str):
        self.threads, self.device = threads, device
        self.measure()  # compiles

    def start(self, vocab: int) -> dict:
        return {}

    def measure(self) -> float:
        if self.device != "cpu":
            from edgeattn.devices import make_backend
            return make_backend(self.device).bandwidth()
        from edgeattn.bandwidth import stream_bandwidth
        return stream_bandwidth(self.threads)


def _prepare(name, checkpoint, folder, device):
    name, _, variant = name.partition(":")
    module = importlib.import_module(f"engine_{name}")
    missing = [package for wanted, package in module.REQUIRES.items() if importlib.util.find_spec(wanted) is None]
    if missing:
        return {"error": f"not installed in {sys.executable}: {', '.join(missing)} (pip install {' '.join(missing)})"}
    try:
        config = json.loads((Path(checkpoint) / "config.json").read_text())
        return module.prepare(Path(checkpoint), Path(folder), config, variant, device)
    except (RuntimeError, OSError, ValueError) as error:
        return {"error": " ".join(str(error).split())}


def _answer(runner, request):
    call = getattr(runner, request.pop("do"))
    return call(**request)


def main(mode: str, name: str, *rest: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with replies

    def reply(value):
        print(json.dumps(value), file=replies, flush=True)
    if mode == "prepare":
        reply(_prepare(name, *rest))
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process would outlive peers.py
    path, context, threads, device = rest[0], int(rest[1]), int(rest[2]), rest[3]
    runner = StreamRunner(threads, device) if name == "stream" else Runner(name, path, context, threads, device)
    for line in sys.stdin:
        reply(_answer(runner, json.loads(line)))


if __name__ == "__main__":
    main(*sys.argv[1:])
