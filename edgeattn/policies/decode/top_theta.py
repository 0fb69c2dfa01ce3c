"""Top-Theta (arXiv 2502.08363): keys are read in full, values only where a score passes a threshold calibrated for the query head.

The paper leaves out single tokens; here a page of values is read if any query head of the group has a score in it that passes, and so is
the page with the best one. The softmax counts every score (the paper's exact denominator), and the weight that is left out goes to the mean
value. Thresholds depend on the number of tokens as alpha + beta * ln n; calibrate_thresholds.py fits them.
"""
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class TopTheta:
    """
    dense_layers  first layers that read every value
    means         whether what is left out is stood for by the mean value of the tokens held
    """
    dense_layers: int = 2
    means: bool = True

    index: ClassVar[str] = ""
    index_size: ClassVar[int] = 0
    pages_always: ClassVar[int] = 0
    combine: ClassVar[str] = "head"
    shared: ClassVar[bool] = False
    thresholds: ClassVar[bool] = True

    def __post_init__(self):
        if self.dense_layers < 0:
            raise ValueError(f"need dense_layers >= 0, got {self.dense_layers}")

    def sources(self, layers: int) -> list[int | None]:
        """No layer selects pages: keys are read in full."""
        return [None] * layers

    def operators(self, layer: int) -> list[tuple[str, dict]]:
        return []

    def load(self, folder, config: dict):
        from edgeattn.calibrate_thresholds import load_thresholds
        return load_thresholds(folder, config)

    def tokens(self, held: int) -> float:
        return 0
