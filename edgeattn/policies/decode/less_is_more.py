"""LessIsMore (arXiv 2508.07101): layers select as in TidalDecode, but one set serves all heads, and recent tokens get a fixed part.

Query heads take turns to name their next best page until the set is full, so that each brings in what it needs most. The paper names
tokens; here a page is worth its best token. The first page stands for its sink tokens and counts as recent.
"""
from dataclasses import dataclass

from edgeattn.page_formats import PAGE
from edgeattn.policies.decode.tidal_decode import TidalDecode


@dataclass(frozen=True)
class LessIsMore(TidalDecode):
    """recent_share   part of `budget` for the first page and the newest ones, of which there are `recent` at least
    ValueError: not from 0 to 1."""
    budget: int = 2048
    recent: int = 2
    recent_share: float = 0.25

    score, combine = "rank", "best"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.recent_share <= 1:
            raise ValueError(f"need recent_share from 0 to 1, got {self.recent_share}")

    def operators(self, layer):
        recent = max(self.recent, int(self.recent_share * self.budget) // PAGE - 1)
        return [(name, options | {"recent": recent}) for name, options in super().operators(layer)]
