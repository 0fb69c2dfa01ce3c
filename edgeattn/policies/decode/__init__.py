"""Policies that choose what a decode step reads, one file each."""
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class SelectionPolicy:
    """What methods are made of that score pages and read the best; a file's class says where it differs. Fields are options:

    budget        tokens that a KV head reads at a step, at least; in whole pages
    fraction      the same, as a part of the tokens it holds
    recent        newest pages that are always read, the one being filled among them; so is the first page
    dense_layers  first layers that read everything
    reuse         a list serves more steps, twice as many each time, up to 16, as long as this part of the pages that the next one
                  chooses were in it; 0: every step makes its own
    ValueError: a number out of range.

    Class attributes: `score`, `combine` and `block` of the operator select_pages, `index` (cache/budget.py, SelectionPlan), and whether
    layers read each other's selection (`shared`): then page i must hold the same tokens in all layers and heads. `thresholds`: whether
    values are read by calibrated thresholds (calibrate_thresholds.py), `means`: and what is left out is stood for by the mean value.
    """
    budget: int = 2048
    fraction: float = 0.0
    recent: int = 3
    dense_layers: int = 2
    reuse: float = 0.0

    score: ClassVar[str] = "bound"
    combine: ClassVar[str] = "head"
    index: ClassVar[str] = ""
    block: ClassVar[int] = 1
    shared: ClassVar[bool] = False
    thresholds: ClassVar[bool] = False
    means: ClassVar[bool] = False  # a field or property where it is an option

    def __post_init__(self):
        if self.budget < 0 or not 0 <= self.fraction <= 1 or not 0 <= self.reuse <= 1:
            raise ValueError(f"need budget >= 0, fraction and reuse from 0 to 1, got {self.budget=} {self.fraction=} {self.reuse=}")
        if self.recent < 2 or self.dense_layers < 0:
            raise ValueError(f"need recent >= 2 pages and dense_layers >= 0, got {self.recent=} {self.dense_layers=}")

    def sources(self, layers: int) -> list[int | None]:
        """For each layer the one whose selection it reads; None: it reads everything."""
        return [None if layer < self.dense_layers else layer for layer in range(layers)]

    def operators(self, layer: int) -> list[tuple[str, dict]]:
        """What makes a layer's selection before its attention: operators with their attributes. Their ARGS may name the attention's own
        tensors and attributes, "batch.*", "cache.*" and "selection.*"."""
        return [("select_pages", {"score": self.score, "combine": self.combine, "budget": self.budget, "fraction": float(self.fraction),
                                  "recent": self.recent, "reach": 1.0, "reuse": float(self.reuse), "block": self.block})]

    @property
    def index_size(self) -> int:
        """`size` of the index."""
        return self.block

    @property
    def pages_always(self) -> int:
        """That a list holds at most whatever the scores are, without quantised pages."""
        return 2 * self.block - 1 + self.recent

    def load(self, folder, config: dict):
        """What scores multiply queries and keys with, a float32 array for the operator's input `components`, or None. config: the folder's
        edgeattn.json. ValueError: the model lacks what this method needs."""

    def tokens(self, held: int) -> float:
        """That a head with an even share reads at most, of `held`."""
        return max(self.budget, self.fraction * held)


def follow(layers: int, dense_layers: int, selecting: list[int]) -> list[int | None]:
    """`sources` where the `selecting` layers read everything, as the first ones do, and each chooses for those up to the next."""
    found, last = [], None
    for layer in range(layers):
        last = layer if layer in selecting else last
        found.append(None if layer < dense_layers or layer == last else last)
    return found
