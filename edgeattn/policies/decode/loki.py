"""Loki (arXiv 2406.02542): pages by their best token's score along the first principal components of the keys.

The components are measured on the model (edgeattn calibrate) and applied to rotated keys without taking their mean off. A group's query
heads are summed. The paper chooses tokens; a page is worth its best one here. Keys along `rank` components are kept in halves besides the
cache: 2 * rank bytes a token and KV head, which at a quarter of the head's channels is as much as its keys take in 4 bits. So every step
reads as much index as those keys, and this cannot be faster than reading them all: it is here to compare with.
"""
from dataclasses import dataclass

from edgeattn.policies.decode import SelectionPolicy


@dataclass(frozen=True)
class Loki(SelectionPolicy):
    """rank: components; 0: a quarter of the head's channels."""
    fraction: float = 0.25
    rank: int = 0

    score, index = "components", "components"

    def __post_init__(self):
        super().__post_init__()
        if self.rank < 0:
            raise ValueError(f"rank must be 0 (a quarter of the head's channels) or more, got {self.rank}")

    @property
    def index_size(self) -> int:
        return self.rank

    def load(self, folder, config):
        from edgeattn.principal_components import load_components
        head_dim = config["model"]["head_dim"]
        if self.rank > head_dim:
            raise ValueError(f"rank must be at most {head_dim}, this model's channels of a head, got {self.rank}")
        return load_components(folder, config)
