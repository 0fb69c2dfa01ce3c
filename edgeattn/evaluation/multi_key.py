"""RULER's multi-key retrieval: many facts of one form, of which only that with the right key answers."""
from dataclasses import dataclass
from typing import ClassVar

from edgeattn.evaluation import words
from edgeattn.evaluation.asking import plant
from edgeattn.evaluation.lookups import fact, question
from edgeattn.evaluation.ruler import Ruler


@dataclass(frozen=True)
class MultiKey(Ruler):
    """keys: facts in a text."""
    keys: int = 16

    each: ClassVar[int] = 8
    limit: ClassVar[int] = 24

    def sample(self, rng, tokenizer, book, length):
        names, codes = words.names(rng, self.keys), words.codes(rng, self.keys)
        asked = rng.permutation(self.keys)[:self.each]
        return plant(rng, tokenizer, book, length, [fact(*pair) for pair in zip(names, codes)], [question(names[i]) for i in asked],
                     [[codes[i]] for i in asked])
