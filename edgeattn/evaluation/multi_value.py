"""RULER's multi-value retrieval: one key has several values, in different places, and all of them are wanted."""
from dataclasses import dataclass
from typing import ClassVar

from edgeattn.evaluation import words
from edgeattn.evaluation.asking import plant
from edgeattn.evaluation.lookups import fact
from edgeattn.evaluation.ruler import Ruler


@dataclass(frozen=True)
class MultiValue(Ruler):
    each: ClassVar[int] = 4

    def sample(self, rng, tokenizer, book, length):
        name, codes = words.names(rng, 1)[0], words.codes(rng, self.each)
        question = f"\nWhat are all the secret codes of the {name}?"
        return plant(rng, tokenizer, book, length, [fact(name, code) for code in codes], [question], [codes])
