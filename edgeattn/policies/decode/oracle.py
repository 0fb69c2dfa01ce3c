"""The pages with the largest softmax weights, which are known only after every key was read: what any selection can reach at best."""
from dataclasses import dataclass

from edgeattn.policies.decode import SelectionPolicy


@dataclass(frozen=True)
class Oracle(SelectionPolicy):
    score = "mass"
