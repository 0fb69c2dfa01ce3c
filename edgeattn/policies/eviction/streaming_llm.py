"""Keep the most recent tokens; the cache keeps the sinks (StreamingLLM, arXiv 2309.17453). The score is the position."""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class StreamingLlm:
    mass, probes = "", 0

    def scores(self, heads):
        return heads.positions.astype(np.float32)
