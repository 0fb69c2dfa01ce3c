"""Kullback-Leibler divergence of next-token distributions from those of a base: what a setting changes, whatever the text is.

The base is a file of log-probabilities, as llama.cpp's perplexity tool keeps one for --kl-divergence: of the first setting of a call, or of
another model of the same tokenizer. A NumPy array [windows, length] of BASE's records, so the text comes along with it.
"""
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgeattn.evaluation import Source
from edgeattn.evaluation.outcome import Outcome
from edgeattn.evaluation.windows import log_probabilities, windows


def layout(vocab: int) -> np.dtype:
    return np.dtype([("token", "<i4"), ("logs", "<f4", (vocab,))])


@dataclass(frozen=True)
class Kld:
    """base: a file to compare with. save: where to write this model's as one; a model that has no base is its own. decode: as perplexity's.
    """
    base: str | None = None
    save: str | None = None
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
        with SavedBase(self.save, model.vocab_size, windows(tokenizer, source)) as saved:
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
    divergences, agreed, losses, others, kv_bytes = [], [], [], [], 0
    for window in base:
        ids, row = window["token"].astype(np.int64), []
        for start, logs, held in log_probabilities(model, ids, min(decode, len(ids) - 1)):
            expected = window["logs"][start:start + len(logs)].astype(np.float64)
            row += (np.exp(expected) * (expected - logs)).sum(-1).tolist()
            agreed += (expected.argmax(-1) == logs.argmax(-1)).tolist()
            losses += loss(logs, ids, start).tolist()
            others += loss(expected, ids, start).tolist()
            kv_bytes = max(kv_bytes, held)
            advance(len(logs))
        divergences.append(row)
    every, own, other = np.concatenate(divergences), float(np.exp(np.mean(losses))), float(np.exp(np.mean(others)))
    metrics = {"median": float(np.median(every)), "99.9 %": float(np.quantile(every, 0.999)), "maximum": float(every.max()),
               "same top": float(np.mean(agreed)), "perplexity": own, "perplexity of the base": other}
    if decode:
        metrics["mean of decoded tokens"] = float(np.mean([row[-decode:] for row in divergences]))
    return Outcome("divergence", [[float(np.mean(row))] for row in divergences], metrics, kv_bytes, base.shape[1])


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


class SavedBase:
    """A base file that is being written: it has its name only when all of it is there. Without a path nothing is kept. ValueError: no room.
    """

    def __init__(self, path: str | None, vocab: int, ids: np.ndarray):
        self.ids, self._path, self._records = ids, path and Path(path), None
        if path:
            needed, free = ids.size * layout(vocab).itemsize, shutil.disk_usage(self._path.parent).free
            if needed > free:  # a mapped file on a full disk would kill the process without a word
                raise ValueError(f"{self._path.parent}: the base's probabilities take {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; "
                                 "give fewer --samples or smaller --lengths, or name a folder with room in TMPDIR or --save-base")
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
            os.replace(self._part, self._path)
        else:
            self._part.unlink(missing_ok=True)
