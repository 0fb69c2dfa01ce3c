"""RULER's common words: a list of coined words, of which some stand in it more often than the others; those are wanted."""
from dataclasses import dataclass
from typing import ClassVar

from edgeattn.evaluation import words
from edgeattn.evaluation.asking import FRAME_TOKENS, fitting, listed
from edgeattn.evaluation.ruler import Ruler


@dataclass(frozen=True)
class CommonWords(Ruler):
    """rare: how often another word stands in the list; a common one stands there ten times as often, or as often as half the list has
    room for."""
    rare: int = 3

    each: ClassVar[int] = 10  # common words
    limit: ClassVar[int] = 80

    def sample(self, rng, tokenizer, book, length):
        every, room = words.coined(rng, self.each + length // self.rare), length - FRAME_TOKENS
        wanted = every[:self.each]
        chosen = fitting(tokenizer, wanted * (10 * self.rare), room // 2)
        if len(chosen) < self.each * (self.rare + 1):  # the others would be the common ones
            raise ValueError(f"{length} tokens are too few for {self.each} words to stand out; raise --lengths")
        used = sum(len(tokenizer.encode(f" {word}", special=False)) for word in chosen)
        chosen += fitting(tokenizer, [word for word in every[self.each:] for _ in range(self.rare)], room - used)
        return listed(tokenizer, [chosen[i] for i in rng.permutation(len(chosen))], "Below is a list of words, of which some come more "
                      "often than others.\n", f"\nWhat are the {self.each} most common words in the list?", wanted)
