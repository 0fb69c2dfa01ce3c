"""What a user gets: the pages whose mean keys score highest with a block's mean queries, as many as their softmax asks for.

Mean pooling as DHSA and SpargeAttn have it (arXiv 2510.24606, 2502.18137) and XAttention's covered part (2503.16428), chosen for the query
heads of a KV head together: their softmax weights over pages are averaged, for the kernel reads for all of them what any asks for. A head
that looks at few pages reads few, one that looks everywhere reads up to a limit. On the bundled model that loses as little as XAttention at
the same density, and less than a fixed number of pages for every head (docs/sparse-prefill.md).
"""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy, double_bits
from edgeattn.prefill_plan import PAGE, QUERIES, LayerKeys, causal, forced, pool, softmax


@dataclass(frozen=True)
class Auto(PrefillPolicy):
    """
    part      of the estimated weight that is covered, the pages that are always read counted in
    least     tokens that a block of queries reads besides those
    budget, fraction  the most that it reads: so many tokens, or so large a part of what it sees, whichever is more
    ValueError: a number out of range.
    """
    recent: int = 8
    part: float = 0.9
    least: int = 256
    budget: int = 1536
    fraction: float = 0.25

    min_len: ClassVar[int] = 3072  # where this machine's was not measured: twice the budget

    def __post_init__(self):
        super().__post_init__()
        if min(self.least, self.budget) < 0 or not (0 <= self.fraction <= 1 and 0 <= self.part <= 1):
            raise ValueError(f"need least and budget >= 0, part and fraction from 0 to 1, got {self.least=} {self.budget=} {self.part=} "
                             f"{self.fraction=}")

    def tokens(self, seen):
        return min(seen, max(self.budget, int(self.fraction * seen)))

    def operators(self):
        about = {"sink": self.sink, "recent": self.recent, "part": float(self.part), "fraction": double_bits(self.fraction),
                 "least": -(-self.least // PAGE), "budget": -(-self.budget // PAGE)}
        return [("choose_by_means", about)]

    def select(self, q, k, scale, layer=0, assets=None):
        k, n = LayerKeys.of(k), q.shape[1]
        seen, kept = causal(n, k.tokens), forced(n, k.tokens, self.sink, self.recent)
        most = np.maximum(np.ceil(self.fraction * seen.sum(1)), -(-self.budget // PAGE))
        scores = pool(q, QUERIES).reshape(len(k), -1, *seen.shape[:1], q.shape[2]) @ (scale * k.means[:, None].swapaxes(2, 3))
        weights = softmax(np.where(seen, scores, -np.inf)).mean(1)                 # [kv_heads, query blocks, pages]
        free = np.where(seen & ~kept, weights, 0)
        order = np.argsort(-free, -1, kind="stable")
        covered = np.cumsum(np.take_along_axis(free, order, -1), -1) + (weights - free).sum(-1, keepdims=True)
        wanted = seen.shape[1] if self.part == 1 else (covered < self.part).sum(-1) + 1  # whatever rounding makes of the sum
        wanted = np.clip(wanted, -(-self.least // PAGE), np.maximum(most - kept.sum(1), 0))
        chosen = np.zeros(weights.shape, bool)
        np.put_along_axis(chosen, order, np.arange(seen.shape[1]) < np.broadcast_to(wanted, weights.shape[:2])[..., None], -1)
        return self.plan(np.repeat(chosen, len(q) // len(k), 0), None, n, k.tokens)
