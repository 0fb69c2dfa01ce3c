"""RULER's frequent words: coined words as often as a zeta distribution says, of which the three that stand there most often are wanted."""
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from edgeattn.evaluation import words
from edgeattn.evaluation.asking import FRAME_TOKENS, fitting, listed
from edgeattn.evaluation.ruler import Ruler

STOCK = 200  # different words


@dataclass(frozen=True)
class FrequentWords(Ruler):
    """exponent: of the zeta distribution."""
    exponent: float = 2.0

    each: ClassVar[int] = 3

    def sample(self, rng, tokenizer, book, length):
        ranks, stock = rng.zipf(self.exponent, length), words.coined(rng, STOCK)
        chosen = fitting(tokenizer, [stock[rank - 1] for rank in ranks if rank <= STOCK], length - FRAME_TOKENS)
        if len(set(chosen)) < self.each:
            raise ValueError(f"{length} tokens are too few for {self.each} different words; raise --lengths")
        wanted = [word for word, _ in Counter(chosen).most_common(self.each)]
        return listed(tokenizer, chosen, "Read this coded text and keep track of how often each word comes.\n",
                      f"\nWhat are the {self.each} most frequent words in the coded text?", wanted)
