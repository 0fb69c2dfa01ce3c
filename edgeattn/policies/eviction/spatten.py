"""SpAtten's cascade token pruning (arXiv 2012.09852): importance adds up over layers, and what one layer has pruned goes from deeper ones.

The same tokens go in all KV heads of a layer. Combine with layer_budget "cascade", which lets deeper layers keep fewer.
"""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

PRUNED = np.float32(-1e9)  # below every importance, so that these tokens go first


@dataclass(frozen=True)
class Spatten:
    mass: ClassVar[str] = "sum"
    probes: ClassVar[int] = 64

    def scores(self, heads):
        importance = heads.carry.setdefault("importance", np.zeros(heads.length, np.float32))
        np.add.at(importance, heads.positions, heads.mass)
        scores = importance[heads.positions]
        below = heads.kept_below()
        return scores if below is None else np.where(below[heads.positions], scores, scores + PRUNED)
