"""TidalDecode (arXiv 2410.05076): two layers read everything and choose for the layers that follow them, anew at each step.

The first layers are dense; the next one and, half way up, the re-selection layer read all pages and write the list that the layers after
them read. The paper selects tokens; here a page is worth its best token. With grouped queries, which the paper leaves open, a token is
worth the sum of its products with the group's queries, so each KV head has one list.
"""
from dataclasses import dataclass
from typing import ClassVar

from edgeattn.policies.decode import SelectionPolicy, follow


@dataclass(frozen=True)
class TidalDecode(SelectionPolicy):
    """reselect   the re-selection layer; 0: the middle one, as the paper's choice (13 of 32) is a model's own
    ValueError: it is not behind the first selection layer."""
    budget: int = 256
    reselect: int = 0

    score = "peak"
    shared: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.reselect and self.reselect <= self.dense_layers:
            raise ValueError(f"layer {self.dense_layers} selects first: need reselect > {self.dense_layers}, got {self.reselect}")

    def sources(self, layers):
        if self.reselect >= layers:
            raise ValueError(f"this model has layers 0 to {layers - 1}: no layer {self.reselect} can select again")
        return follow(layers, self.dense_layers, [self.dense_layers, max(self.reselect or layers // 2, self.dense_layers)])
