"""KIVI (arXiv 2402.02750): keys by channel within a page, values by token."""
from dataclasses import dataclass

from edgeattn.page_formats import PageFormat


@dataclass(frozen=True)
class Kivi:
    rotated = False
    mass, probes, group, anchors = "", 0, 1, False

    def formats(self, head_dim, k_type, v_type):
        return [PageFormat(head_dim, k_type, v_type)]

    def pages(self):
        return [0]
