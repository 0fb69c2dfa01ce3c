"""ZipCache (arXiv 2405.14256): salient tokens in wider codes; keys by channel, values by token with scales for each channel.

A token is salient by the attention it received over the probes that could see it. Of each group of five pages the three with the most
salient tokens are kept in the types asked for, the other two in 2 bits.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.page_formats import BITS, PageFormat
from edgeattn.policies.storage import StoragePolicy


@dataclass(frozen=True)
class Zipcache(StoragePolicy):
    mass, probes, group = "sum", 32, 5

    def formats(self, head_dim, k_type, v_type):
        narrow = (kind if BITS[kind] >= 16 else "int2" for kind in (k_type, v_type))
        return [PageFormat(head_dim, k, v, separated=BITS[v] < 16) for k, v in ((k_type, v_type), tuple(narrow))]

    def pages(self):
        return [0, 0, 0, 1, 1]

    def saliency(self, mass, seen, norms):
        return mass / np.maximum(seen, 1)
