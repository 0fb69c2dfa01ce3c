"""Any pages: what a selection must beat."""
from dataclasses import dataclass

from edgeattn.policies.decode import SelectionPolicy


@dataclass(frozen=True)
class Random(SelectionPolicy):
    score = "random"
