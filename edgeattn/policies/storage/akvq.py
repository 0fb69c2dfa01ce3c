"""After AKVQ-VL (arXiv 2501.15021), for text: pivot tokens stay in 16 bits, the rest is rotated and kept in few bits by token.

A pivot received far more attention than the others, or its key is anomalously short. The first page holds pivots: at every sealing the
32 tokens with the highest saliency of that page and of those about to be sealed stay there.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.page_formats import PageFormat
from edgeattn.policies.storage import StoragePolicy


@dataclass(frozen=True)
class Akvq(StoragePolicy):
    rotated = anchors = norms = True
    mass, probes = "sum", 32

    def formats(self, head_dim, k_type, v_type):
        return [PageFormat(head_dim, k_type, v_type, k_axis="token")]

    def saliency(self, mass, seen, norms):
        """The larger of attention over its median and the median key norm over the key's norm."""
        attention = mass / np.maximum(seen, 1)
        usual, length = (np.median(x, axis=-1, keepdims=True) for x in (attention, norms))
        return np.maximum(attention / np.maximum(usual, 1e-30), length / np.maximum(norms, 1e-30)).astype(np.float32)
