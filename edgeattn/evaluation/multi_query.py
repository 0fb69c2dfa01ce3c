"""RULER's multi-query retrieval: several facts are asked for in one question."""
from dataclasses import dataclass
from typing import ClassVar

from edgeattn.evaluation import words
from edgeattn.evaluation.asking import plant
from edgeattn.evaluation.lookups import fact
from edgeattn.evaluation.ruler import Ruler


@dataclass(frozen=True)
class MultiQuery(Ruler):
    each: ClassVar[int] = 4
    limit: ClassVar[int] = 80

    def sample(self, rng, tokenizer, book, length):
        names, codes = words.names(rng, self.each), words.codes(rng, self.each)
        asked = [f"the secret code of the {name}" for name in names]
        question = f"\nWhat is {', what is '.join(asked[:-1])} and what is {asked[-1]}?"
        return plant(rng, tokenizer, book, length, [fact(*pair) for pair in zip(names, codes)], [question], [codes])
