"""One fact in a text, asked for at the end: how far back a model finds it. The grid is the lengths of a call by POSITIONS."""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.evaluation import Source, words
from edgeattn.evaluation.asking import ANSWER_TOKENS, ask_alone
from edgeattn.evaluation.lookups import draw
from edgeattn.evaluation.outcome import Outcome

POSITIONS = 0.0, 0.25, 0.5, 0.75, 1.0  # of the text


@dataclass(frozen=True)
class Needle:
    samples: ClassVar[int] = 40
    length: ClassVar[int] = 4000
    room: ClassVar[int] = ANSWER_TOKENS

    def total(self, source: Source) -> int:
        return -(-source.samples // len(POSITIONS)) * len(POSITIONS)

    def measure(self, model, tokenizer, source: Source, advance) -> Outcome:
        book, rng = words.book(tokenizer, source.text, source.length, source.seed), np.random.default_rng([source.seed, source.length])
        found = Outcome("share", [])
        while found.samples < source.samples:
            hay = draw(rng, tokenizer, book, source.length, False, len(POSITIONS), list(POSITIONS))
            right, *about = ask_alone(model, tokenizer, hay)
            found.add(right, *about)
            advance(len(right))
        found.metrics = {f"at {100 * place:.0f} %": float(share) for place, share in zip(POSITIONS, np.mean(found.values, 0))}
        return found
