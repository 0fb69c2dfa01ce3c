"""What RULER's tasks share (Hsieh et al., 2024, arXiv 2404.06654): questions to a made-up text, in whose answers each wanted string counts.
"""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.evaluation import Source, words
from edgeattn.evaluation.asking import Haystack, ask_together
from edgeattn.evaluation.outcome import Outcome


@dataclass(frozen=True)
class Ruler:
    """A task's file writes `sample`. each: wanted strings of a sample; limit: tokens of an answer."""
    each: ClassVar[int]
    samples: ClassVar[int] = 40
    length: ClassVar[int] = 4000
    limit: ClassVar[int] = 48

    @property
    def room(self) -> int:
        return self.limit

    def sample(self, rng: np.random.Generator, tokenizer, book: list[int], length: int) -> Haystack:
        raise NotImplementedError

    def total(self, source: Source) -> int:
        return -(-source.samples // self.each) * self.each

    def measure(self, model, tokenizer, source: Source, advance) -> Outcome:
        book, rng = words.book(tokenizer, source.text, source.length, source.seed), np.random.default_rng([source.seed, source.length])
        found = Outcome("share", [])
        while found.samples < source.samples:
            right, *about = ask_together(model, tokenizer, self.sample(rng, tokenizer, book, source.length), self.limit)
            found.add(right, *about)
            advance(len(right))
        return found
