"""DELTA (arXiv 2510.09883): three layers read everything and choose one set of pages for all heads of the layers that follow them.

A page is worth the sum over its tokens of the largest softmax weight that any query head of the layer gives the token. The selecting layers
are the first one behind the dense ones, and those at 14/28 and 22/28 of the depth, as in the paper's model of 28 layers. The paper keeps
64 pages of 16 tokens, the newest 8 of them always; that is 32 and 4 of ours. The first page is always read here.
"""
from dataclasses import dataclass
from typing import ClassVar

from edgeattn.policies.decode import SelectionPolicy, follow


@dataclass(frozen=True)
class Delta(SelectionPolicy):
    budget: int = 1024
    recent: int = 4

    score, combine = "max_mass", "layer"
    shared: ClassVar[bool] = True

    def sources(self, layers):
        return follow(layers, self.dense_layers, [max(layer, self.dense_layers) for layer in (0, layers * 14 // 28, layers * 22 // 28)])
