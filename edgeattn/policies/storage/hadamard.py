"""Keys and values by token, keys rotated so that outlier channels are spread (QuaRot, arXiv 2404.00456)."""
from dataclasses import dataclass

from edgeattn.page_formats import PageFormat


@dataclass(frozen=True)
class Hadamard:
    rotated = True
    mass, probes, group, anchors = "", 0, 1, False

    def formats(self, head_dim, k_type, v_type):
        return [PageFormat(head_dim, k_type, v_type, k_axis="token")]

    def pages(self):
        return [0]
