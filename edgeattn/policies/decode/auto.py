"""What a user gets: Quest's page scores, with the range of the keys counted less than in a bound.

Measured on the bundled model (docs/sparse-decode.md): at reach 0.4 as many facts are found as at 1, and the loss of perplexity is a
third. An eighth of the context keeps both near dense attention, a smaller part does not.
"""
from dataclasses import dataclass

from edgeattn.policies.decode.quest import Quest


@dataclass(frozen=True)
class Auto(Quest):
    fraction: float = 0.125
    dense_layers: int = 0
    reach: float = 0.4
