"""What a user gets: the pages whose middle keys score highest with a block's mean queries, chosen for all query heads of a KV head together.

Between mean pooling (as XAttention, SpargeAttn and DHSA compare it) and Quest's ranges: a page stands as the middle of its keys' range, channel by
channel, which quantised pages know, so that nothing but their parameters is read. On the bundled model that finds more of the softmax weight than
mean keys do, and one choice for a KV head more than a choice for each query head whose union is read (docs/sparse-prefill.md).
"""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, LayerKeys, best, causal, forced, pool, softmax


@dataclass(frozen=True)
class Auto(PrefillPolicy):
    """
    budget    tokens that a block of queries reads, at least
    fraction  the same, as a part of those that it sees
    ValueError: a number out of range.
    """
    recent: int = 8
    budget: int = 1024
    fraction: float = 0.125

    min_len: ClassVar[int] = 2048  # with twice the budget, attention's part of a chunk is still small

    def __post_init__(self):
        super().__post_init__()
        if self.budget < 0 or not 0 <= self.fraction <= 1:
            raise ValueError(f"need budget >= 0 and fraction from 0 to 1, got {self.budget=} {self.fraction=}")

    def tokens(self, seen):
        return min(seen, max(self.budget, int(self.fraction * seen)))

    def select(self, q, k, scale, layer=0, assets=None):
        k, group, n = LayerKeys.of(k), len(q) // len(k), q.shape[1]
        found, m = [k.middles(head) for head in range(len(k))], k.tokens
        seen, kept = causal(n, m), forced(n, m, self.sink, self.recent)
        count = np.maximum(np.ceil(self.fraction * seen.sum(1)), -(-self.budget // PAGE))
        blocks = []
        for head, pages in enumerate(found):
            scores = pool(q[head * group:(head + 1) * group], QUERIES) @ (scale * pages.T)
            weights = softmax(np.where(seen, scores, -np.inf)).sum(0)
            blocks.append(best(weights, seen & ~kept, np.maximum(count - kept.sum(1), 0)))
        return self.plan(np.repeat(np.stack(blocks), group, 0), None, n, m)
