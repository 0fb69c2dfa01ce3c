"""RULER's variable tracking: a code is handed on from place to place, and whoever wants to know the last one's must follow all of them."""
from dataclasses import dataclass
from typing import ClassVar

from edgeattn.evaluation import words
from edgeattn.evaluation.asking import plant
from edgeattn.evaluation.lookups import fact, question
from edgeattn.evaluation.ruler import Ruler


@dataclass(frozen=True)
class VariableTracking(Ruler):
    """chains: codes that are handed on, each asked for at its end. hops: how often each is."""
    hops: int = 1

    each: ClassVar[int] = 4  # chains
    limit: ClassVar[int] = 24

    def sample(self, rng, tokenizer, book, length):
        names, codes = words.names(rng, self.each * (self.hops + 1)), words.codes(rng, self.each)
        chains = [names[i::self.each] for i in range(self.each)]
        sentences = [fact(chain[0], code) for chain, code in zip(chains, codes)]  # in RULER, too, a name comes before whoever takes it over
        sentences += [f" The secret code of the {chain[i + 1]} is the secret code of the {chain[i]}."
                      for i in range(self.hops) for chain in chains]
        return plant(rng, tokenizer, book, length, sentences, [question(chain[-1]) for chain in chains], [[code] for code in codes])
