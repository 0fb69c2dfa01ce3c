"""Ways to quantise sealed pages, one file each."""
from typing import Protocol

import numpy as np

from edgeattn.page_formats import PageFormat


class StoragePolicy(Protocol):
    """A frozen dataclass of options.

    rotated  keys are rotated by a Hadamard matrix, after rotary
    mass     the attention statistic it needs, as in policies/eviction: "", "sum" or "last"; probes: of how many queries
    group    pages that are sealed together, so that tokens can be sorted among them; 1: page by page
    anchors  whether the first page, which is never quantised, takes the most salient tokens of those about to be sealed
    """
    rotated: bool
    mass: str
    probes: int
    group: int
    anchors: bool

    def formats(self, head_dim: int, k_type: str, v_type: str) -> list[PageFormat]:
        """Formats of sealed pages, the widest first."""

    def pages(self) -> list[int]:
        """For each page of a group the index of its format; a group's most salient tokens go to its first pages."""

    def saliency(self, mass: np.ndarray, seen: np.ndarray, keys) -> np.ndarray:
        """[tokens] float32 -> order of importance, of one KV head's tokens that are about to be sealed. keys() [tokens, head_dim]."""
