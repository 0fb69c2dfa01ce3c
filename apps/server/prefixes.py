"""Sequences of finished answers, kept so that a request that begins alike need not compute its beginning again."""
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgeattn.page_formats import PAGE


@dataclass(eq=False)
class Kept:
    tokens: np.ndarray  # int64, all of them in the cache
    sequence: object
    session: str | None


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens are the same."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter


class Prefixes:
    """At most `most` sequences, the least recently used of which goes first; conversations with a session go last."""

    def __init__(self, model, most: int):
        self._model, self._most, self._kept = model, most, []  # the newest last

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, tokens: list[int], sequence, session: str | None = None) -> None:
        tokens = np.asarray(tokens[:sequence.length], np.int64)
        for old in [kept for kept in self._kept if shared_length(kept.tokens, tokens) == len(kept.tokens)]:
            self._drop(old)  # all that it holds is here too
        self._kept.append(Kept(tokens, sequence, session))
        while len(self._kept) > self._most:
            self.drop_one()

    def begin(self, tokens: list[int], running: Iterable = ()) -> tuple[object, int]:
        """A sequence that holds the longest known beginning of `tokens` -> (sequence, how many tokens that is): fewer than there are,
        since the last one's logits are needed. running: runs whose sequences may be shared too."""
        ids, best, source = np.asarray(tokens, np.int64), 0, None
        for one in [*self._kept, *running]:
            held = np.asarray(one.tokens[:one.sequence.length], np.int64)
            shared = min(shared_length(held, ids), len(ids) - 1)
            if shared > best:
                best, source = shared, one
        if source is None:
            return self._model.new_sequence(), 0
        sequence = self._model.fork(source.sequence)
        left = self._model.truncate(sequence, best)
        if source in self._kept:
            self._kept.remove(source)
            if len(source.tokens) - best > PAGE:  # a different end, which somebody may return to
                self._kept.append(source)
            else:
                self._model.free(source.sequence)
        return sequence, left

    def drop_one(self) -> bool:
        """Free the pages of the one that is missed least. False: there is none."""
        if not self._kept:
            return False
        self._drop(next((kept for kept in self._kept if kept.session is None), self._kept[0]))
        return True

    def _drop(self, kept):
        self._kept.remove(kept)
        self._model.free(kept.sequence)

    def clear(self) -> None:
        while self.drop_one():
            pass
