"""Quest (arXiv 2406.10774): pages by the most that any of their keys could score, from the range of each channel.

Quantised pages with parameters by channel know that range, so that nothing is stored for it. A KV head's pages are scored by the best of
its query heads. At `reach` below 1 the range counts less than the middle of the keys: no bound any more, but a better guess.
"""
from dataclasses import dataclass

from edgeattn.policies.decode import SelectionPolicy


@dataclass(frozen=True)
class Quest(SelectionPolicy):
    reach: float = 1.0

    index = "bounds"

    def operators(self, layer):
        return [(name, options | {"reach": float(self.reach)}) for name, options in super().operators(layer)]
