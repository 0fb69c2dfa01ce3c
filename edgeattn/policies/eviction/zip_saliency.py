"""Keep salient tokens (normalised attention of ZipCache, arXiv 2405.14256).

The score is the mean attention received per probed query that could see the token: age alone neither helps nor harms.
"""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ZipSaliency:
    mass, probes = "sum", 64

    def scores(self, heads):
        return heads.mass / np.maximum(heads.seen, np.float32(1))
