"""Pages at random: the other end of the scale."""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import best, causal


@dataclass(frozen=True)
class Random(PrefillPolicy):
    """fraction: of the pages that a query block sees, forced ones aside"""
    fraction: float = 0.125

    reference: ClassVar[bool] = True

    def choose(self, q, k, scale, layer, head, assets):
        allowed = causal(q.shape[1], len(k))
        scores = np.random.default_rng([layer, head, len(k)]).random((len(q), *allowed.shape))
        return best(scores, allowed, np.broadcast_to(np.ceil(self.fraction * allowed.sum(1)), scores.shape[:2]))
