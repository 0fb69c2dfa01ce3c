"""HISA (arXiv 2603.28458) without a trained indexer: blocks of 128 tokens by their mean keys first, then pages inside the best blocks.

Pages are scored by Quest's bound, so this reads an eighth of Quest's index and then that of the best blocks alone. Where those hold the
whole context, it chooses what Quest does.
"""
from dataclasses import dataclass

from edgeattn.policies.decode.quest import Quest


@dataclass(frozen=True)
class Hisa(Quest):
    """blocks: how many stay, the first and the last one with a page to choose among them. A list is shorter than its budget where they
    hold fewer pages."""
    blocks: int = 64

    score, index = "hierarchy", "hierarchy"

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.blocks <= 4096:
            raise ValueError(f"blocks must be 2 to 4096 (of 128 tokens), got {self.blocks}")

    def operators(self, layer):
        return [(name, options | {"blocks": self.blocks}) for name, options in super().operators(layer)]
