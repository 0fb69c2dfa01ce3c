"""Read the first page and the most recent ones (StreamingLLM, arXiv 2309.17453)."""
from dataclasses import dataclass

from edgeattn.policies.decode import SelectionPolicy


@dataclass(frozen=True)
class SinkWindow(SelectionPolicy):
    dense_layers: int = 0

    score = "recency"
