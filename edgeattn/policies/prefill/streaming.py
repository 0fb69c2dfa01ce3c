"""StreamingLLM's mask for prompts (arXiv 2309.17453): the first pages and the newest ones. The floor that every other method must beat."""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import forced


@dataclass(frozen=True)
class Streaming(PrefillPolicy):
    """sink and recent: 256 and 2,048 tokens"""
    sink: int = 8
    recent: int = 64

    def operators(self):
        return [("choose_by_spans", {"sink": self.sink, "recent": self.recent, "alpha": 0.0, "beta": 0.0})]

    def choose(self, q, k, scale, layer, head, assets):
        return np.broadcast_to(forced(q.shape[1], len(k), self.sink, self.recent), (len(q), *forced(q.shape[1], len(k)).shape))
