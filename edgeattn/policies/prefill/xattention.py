"""XAttention (arXiv 2503.16428): pages by the sums along their antidiagonals, until a part `tau` of the estimated weight is covered.

Cut queries and keys into strides of S tokens. Of the S x S pairs of two strides only those on the antidiagonal are scored: every token of
either side takes part, and lines of strong scores, down or across, are met. All those sums are one product of width S * head_dim over n / S
rows and m / S columns. Their means pass through a softmax by row, whose weights are summed over a query block and a page.

The paper's blocks are of 128 tokens, and it counts a stride's whole antidiagonal with itself; here pairs whose key comes after the query
are left out of the mean, which also serves chunks that begin within a stride. The product is of 8 bits
(edgeattn/reference/antidiagonal_weights.py).
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.kernels_cpu import antidiagonal_weights
from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, LayerKeys, causal, cover, forced


@dataclass(frozen=True)
class Xattention(PrefillPolicy):
    """
    tau     part of the estimated weight that is covered
    stride  tokens, a power of two up to 32; the paper has 8 and 16
    """
    tau: float = 0.9
    stride: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.stride not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"stride must be a power of two up to {PAGE}, got {self.stride}")

    def operators(self):
        if self.stride < 8:
            return []
        about = {"sink": self.sink, "recent": self.recent, "stride": self.stride, "tau": float(self.tau)}
        return [("choose_by_antidiagonals", about)]

    def select(self, q, k, scale, layer=0, assets=None):
        keys, n = LayerKeys.of(k).stored(), q.shape[1]
        weights = antidiagonal_weights.run(q, keys, keys.mean(n), scale, self.stride)
        kept = np.broadcast_to(forced(n, len(keys), self.sink, self.recent), weights.shape)
        return self.plan(cover(weights, causal(n, len(keys)), self.tau, kept), None, n, len(keys))
