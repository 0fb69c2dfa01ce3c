"""Facts looked up in a text: one alone, one of eight, one of 32, and eight asked for in turn in one conversation."""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.evaluation import Source, words
from edgeattn.evaluation.asking import ANSWER_TOKENS
from edgeattn.evaluation.lookups import GROUP, MANY, look_up
from edgeattn.evaluation.outcome import Outcome

TITLES = {1: "1 fact", GROUP: f"{GROUP} facts", MANY: f"{MANY} facts", 0: f"{GROUP} in turn"}


@dataclass(frozen=True)
class Recall:
    """facts: which of TITLES, each of which gets as many questions as `samples` says."""
    facts: tuple[int, ...] = tuple(TITLES)

    samples: ClassVar[int] = 32
    length: ClassVar[int] = 4000
    room: ClassVar[int] = 2 * GROUP * ANSWER_TOKENS

    def total(self, source: Source) -> int:
        return sum(-(-source.samples // each) * each for each in (MANY if kind == MANY else GROUP for kind in self.facts))

    def measure(self, model, tokenizer, source: Source, advance) -> Outcome:
        book, found = words.book(tokenizer, source.text, source.length, source.seed), Outcome("share", [])
        for kind in self.facts:
            part = look_up(model, tokenizer, book, source.length, kind, source.samples, advance, source.seed)
            found.values += part["right"]
            found.metrics[TITLES[kind]] = float(np.mean(part["right"]))
            found.kv_bytes, found.tokens = max(found.kv_bytes, part["kv_bytes"]), max(found.tokens, part["tokens"])
        return found
