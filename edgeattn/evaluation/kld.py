"""Kullback-Leibler divergence of next-token distributions from those of a base: what a setting changes, whatever the text is.

The base is a file of log-probabilities, as llama.cpp's perplexity tool keeps one for --kl-divergence: of the first setting of a call, or of
another model of the same tokenizer. A NumPy array [windows, length] of `layout`'s records, so the text comes along with it; behind the
array, where NumPy does not look, a line of JSON says what made it.
"""
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgeattn.cache.session_file import discard_parts
from edgeattn.evaluation import Source
from edgeattn.evaluation.outcome import Outcome
from edgeattn.evaluation.windows import log_probabilities, windows


def layout(vocab: int) -> np.dtype:
    return np.dtype([("token", "<i4"), ("logs", "<f4", (vocab,))])


@dataclass(frozen=True)
class Kld:
    """base: a file to compare with. save: where to write this model's as one, about: what that is to say of itself, as JSON has it; a model
    that has no base is its own. decode: as perplexity's."""
    base: str | None = None
    save: str | None = None
    about: dict | None = None
    decode: int = 128

    samples: ClassVar[int] = 4
    length: ClassVar[int] = 4096
    room: ClassVar[int] = 0

    def total(self, source: Source) -> int:
        return source.samples * source.length

    def measure(self, model, tokenizer, source: Source, advance) -> Outcome:
        if self.base:
            base = open_base(self.base, model.vocab_size, source.length)
            return compare(model, base[:source.samples], self.decode, advance)
        losses, kv_bytes = [], 0
        with SavedBase(self.save, model.vocab_size, windows(tokenizer, source), self.about) as saved:
            for i, ids in enumerate(saved.ids):
                for start, logs, held in log_probabilities(model, ids, min(self.decode, len(ids) - 1)):
                    saved.put(i, start, logs)
                    losses += loss(logs, ids, start).tolist()
                    kv_bytes = max(kv_bytes, held)
                    advance(len(logs))
        return Outcome("divergence", [[0.0] for _ in saved.ids], {"perplexity": float(np.exp(np.mean(losses))), "same top": 1.0},
                       kv_bytes, source.length)


def compare(model, base: np.ndarray, decode: int, advance) -> Outcome:
    """Divergence(base || model), nats a token."""
    found, kv_bytes = Divergence(), 0
    for window in base:
        ids = window["token"].astype(np.int64)
        found.begin()
        for start, logs, held in log_probabilities(model, ids, min(decode, len(ids) - 1)):
            found.add(window["logs"][start:start + len(logs)].astype(np.float64), logs, ids, start)
            kv_bytes = max(kv_bytes, held)
            advance(len(logs))
    every = np.concatenate(found.windows)
    metrics = {"median": float(np.median(every)), "99.9 %": float(np.quantile(every, 0.999)), "maximum": float(every.max()),
               "same top": found.same_top, "perplexity": found.perplexity, "perplexity of the base": found.base_perplexity}
    if decode:
        metrics["mean of decoded tokens"] = float(np.mean([row[-decode:] for row in found.windows]))
    return Outcome("divergence", [[float(np.mean(row))] for row in found.windows], metrics, kv_bytes, base.shape[1])


class Divergence:
    """What log-probabilities differ by from a base's, gathered piece by piece. windows: nats of each token, a list a window."""

    def __init__(self):
        self.windows: list[list[float]] = []
        self._agreed, self._losses = [], ([], [])

    def begin(self) -> None:
        """A window more."""
        self.windows.append([])

    def add(self, expected: np.ndarray, logs: np.ndarray, ids: np.ndarray, start: int) -> None:
        """expected, logs: [tokens, vocab] of the base and the model behind ids[start:], the window's token ids."""
        self.windows[-1] += (np.exp(expected) * (expected - logs)).sum(-1).tolist()
        self._agreed += (expected.argmax(-1) == logs.argmax(-1)).tolist()
        for losses, rows in zip(self._losses, (logs, expected)):
            losses += loss(rows, ids, start).tolist()

    @property
    def mean(self) -> float:
        """Divergence(base || model), nats a token."""
        return float(np.concatenate(self.windows).mean())

    @property
    def same_top(self) -> float:
        """Share of tokens behind which both find the same next one likeliest."""
        return float(np.mean(self._agreed))

    @property
    def perplexity(self) -> float:
        return float(np.exp(np.mean(self._losses[0])))

    @property
    def base_perplexity(self) -> float:
        return float(np.exp(np.mean(self._losses[1])))


def loss(logs: np.ndarray, ids: np.ndarray, start: int) -> np.ndarray:
    """Of the tokens that follow those from `start` on, as far as the window has any."""
    targets = ids[start + 1:start + 1 + len(logs)]
    return -logs[np.arange(len(targets)), targets]


def open_base(path: str, vocab: int, length: int) -> np.ndarray:
    """The records of a base file, mapped. ValueError: it is none, or of another vocabulary or window."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a base file ({error}); make one with edgeattn eval kld --save-base FILE") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype != layout(vocab):
        has = found.dtype["logs"].shape[0] if isinstance(found, np.ndarray) and "logs" in (found.dtype.names or ()) else None
        what = f"of {has} tokens' probabilities, this model has {vocab}" if has else "no base file"
        raise ValueError(f"{path}: {what}; make one with this tokenizer: edgeattn eval kld --save-base FILE")
    if found.shape[1] != length:
        raise ValueError(f"{path}: its windows have {found.shape[1]} tokens; give --lengths {found.shape[1]}")
    return found


def made_by(path: str) -> dict | None:
    """What a base file says of itself; nothing where it says nothing, None where the file is no base at all."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.memmap) or found.dtype.names != layout(1).names:
            return None
        with open(path, "rb") as file:
            file.seek(found.offset + found.nbytes)
            about = json.loads(file.read() or b"{}")
    except (ValueError, EOFError):
        return None
    return about if isinstance(about, dict) else None


class SavedBase:
    """A base file that is being written: it has its name only when all of it is there. Without a path nothing is kept. about: what it is
    to say of itself. ValueError: no room."""

    def __init__(self, path: str | None, vocab: int, ids: np.ndarray, about: dict | None = None):
        self.ids, self._path, self._records, self._about = ids, path and Path(path), None, about or {}
        if path:
            needed, free = ids.size * layout(vocab).itemsize, shutil.disk_usage(self._path.parent).free
            if needed > free:  # a mapped file on a full disk would kill the process without a word
                raise ValueError(f"{self._path.parent}: the base's probabilities take {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; "
                                 "give fewer --samples or smaller --lengths, or name a folder with room in TMPDIR or --save-base")
            discard_parts(self._path)
            self._part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
            self._records = np.lib.format.open_memmap(self._part, "w+", layout(vocab), ids.shape)
            self._records["token"] = ids

    def put(self, window: int, start: int, logs: np.ndarray) -> None:
        if self._records is not None:
            self._records["logs"][window, start:start + len(logs)] = logs

    def __enter__(self) -> "SavedBase":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._records is None:
            return
        self._records.flush()
        if kind is None:
            with open(self._part, "ab") as file:
                file.write(json.dumps(self._about).encode())
            os.replace(self._part, self._path)
        else:
            self._part.unlink(missing_ok=True)
