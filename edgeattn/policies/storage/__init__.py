"""Ways to quantise sealed pages, one file each."""
import numpy as np

from edgeattn.page_formats import PageFormat


class StoragePolicy:
    """What a method is made of; a file's class says where it differs.

    rotated  keys are rotated by a Hadamard matrix, after rotary
    mass     the attention statistic it needs, as in policies/eviction: "", "sum" or "last"; probes: of how many queries
    group    pages that are sealed together, so that tokens can be sorted among them; 1: page by page
    keys     the type of keys, where the method has one of its own; only values' type is then the user's choice
    anchors  whether the first page, which is never quantised, takes the most salient tokens of those about to be sealed
    norms    whether saliency looks at the norms of keys
    """
    rotated, mass, probes, group, anchors, keys, norms = False, "", 0, 1, False, "", False

    def formats(self, head_dim: int, k_type: str, v_type: str) -> list[PageFormat]:
        """Formats of sealed pages, the widest first."""
        raise NotImplementedError

    def pages(self) -> list[int]:
        """For each page of a group the index of its format; a group's most salient tokens go to its first pages."""
        return [0]

    def saliency(self, mass: np.ndarray, seen: np.ndarray, norms: np.ndarray | None) -> np.ndarray:
        """[heads, tokens] float32, all three -> order of importance, of KV heads' tokens that are about to be sealed. Asked for only with a
        group or anchors."""
        raise NotImplementedError
