"""Keep what the last queries attend to, and its neighbours (SnapKV, arXiv 2404.14469).

The score is the attention from the newest forward call's last 32 queries, averaged over `kernel` slots around each token.
"""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Snapkv:
    kernel: int = 5    # slots, odd; past either end counts as zero

    mass, probes = "last", 32

    def __post_init__(self):
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, got {self.kernel}")

    def scores(self, heads):
        padded = np.pad(heads.mass, ((0, 0), (self.kernel // 2,) * 2))
        return np.lib.stride_tricks.sliding_window_view(padded, self.kernel, axis=1).mean(axis=2)
