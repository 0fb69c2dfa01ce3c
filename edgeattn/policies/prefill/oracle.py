"""The pages with the largest true softmax weight of a block of queries, summed over its rows: what one would choose that knew all."""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, best, causal, softmax


@dataclass(frozen=True)
class Oracle(PrefillPolicy):
    """fraction: of the pages that a query block sees, forced ones aside"""
    fraction: float = 0.125

    reference: ClassVar[bool] = True

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        allowed = causal(n, m)
        seen = np.arange(m) <= np.arange(n)[:, None] + m - n
        weights = softmax(np.where(seen, np.einsum("gnd,md->gnm", q, k) * scale, -np.inf))
        pages = np.add.reduceat(np.add.reduceat(weights, np.arange(0, m, PAGE), 2), np.arange(0, n, QUERIES), 1)
        return best(pages, allowed, np.broadcast_to(np.ceil(self.fraction * allowed.sum(1)), pages.shape[:2]))
