"""Keep keys of low norm, which tend to receive more attention (arXiv 2406.11430). The score is minus the key's L2 norm.

In `skip_layers`, where norm says little about attention, the score is the position (recency).
"""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class L2Norm:
    skip_layers: tuple[int, ...] = (0, 1)

    mass, probes = "", 0

    def scores(self, heads):
        if heads.layer in self.skip_layers:
            return heads.positions.astype(np.float32)
        return -np.linalg.norm(heads.keys(), axis=2)
