"""What a user gets: Quest's page scores, with the range of the keys counted less than in a bound, for an eighth of the context.

docs/sparse-decode.md has what was measured on the bundled model: half of an eighth loses more than a hundredth of perplexity and of facts;
reach 0.6 finds as many facts as 1 at less loss; lists that are kept while 0.7 of them would be chosen again lose nothing.
"""
from dataclasses import dataclass

from edgeattn.policies.decode.quest import Quest


@dataclass(frozen=True)
class Auto(Quest):
    fraction: float = 0.125
    dense_layers: int = 0
    reach: float = 0.6
    reuse: float = 0.7
