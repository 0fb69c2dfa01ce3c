"""Landmark attention (arXiv 2305.16300): blocks of tokens, each known by the key of the landmark token that ends it.

For checkpoints alone that were trained with landmarks: edgeattn.json says so by `landmark_period` of its model, the tokens from one
landmark to the next. Attention never sees token ids, so the landmarks must stand where the period puts them, the last of every `period`
tokens; whoever makes the prompt inserts them. Whole blocks are chosen by their landmarks' scores; inside, weights are an ordinary softmax's
over all that is read, where the paper multiplies each block's by its landmark's weight.
"""
from dataclasses import dataclass

from edgeattn.page_formats import PAGE
from edgeattn.policies.decode import SelectionPolicy


@dataclass(frozen=True)
class Landmark(SelectionPolicy):
    """period: tokens of a block with its landmark, the checkpoint's own."""
    period: int = 64

    score, index = "landmarks", "landmarks"

    def __post_init__(self):
        super().__post_init__()
        if self.period < PAGE or self.period % PAGE:
            raise ValueError(f"period must be a multiple of {PAGE}, the tokens of a page, got {self.period}")

    @property
    def block(self) -> int:
        return self.period // PAGE

    def load(self, folder, config):
        trained = config["model"].get("landmark_period")
        if trained != self.period:
            raise ValueError(f"{folder}: landmark attention with a period of {self.period} is for checkpoints trained with it; this "
                             f"model's edgeattn.json has {'no landmark_period' if trained is None else f'landmark_period {trained}'}")
