"""PBS-Attn (arXiv 2510.21270): keys are sorted inside segments, so that those that matter share a block, and blocks are chosen by their
means.

A key's score is its mean true weight over the last queries, 32 of every chunk (the paper: 128 of the prompt), and over the heads of its
KV head (the paper sorts for each head, which would copy keys as often); segments are complete runs of 256 keys. A query block reads its
own segments whole, and of the earlier ones the sorted blocks, 32 keys each for 128 in the paper, whose estimated weights sum to `tau`.
Order inside a segment does not matter to queries behind it, so that nothing is moved: the plan names a block's keys one by one, and pages
where all of a page is chosen.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import EVERY, PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, cover, ends, pool, softmax, spread, true_weights


@dataclass(frozen=True)
class PbsAttn(PrefillPolicy):
    """tau      part of the estimated weight of the earlier segments that is read
    segment  keys that are sorted among themselves, a multiple of 32
    rows     last queries whose weights sort
    """
    tau: float = 0.9
    segment: int = 256
    rows: int = 32

    def __post_init__(self):
        super().__post_init__()
        if self.segment < PAGE or self.segment % PAGE or self.rows < 1:
            raise ValueError(f"need a segment that is a multiple of {PAGE} keys, and rows >= 1, got {self.segment=} {self.rows=}")

    def operators(self):
        about = {"segment": min(self.segment, EVERY), "tau": float(self.tau), "sampled": self.rows}
        return [("choose_by_sorting", {"sink": self.sink, "recent": self.recent} | about)] if self.rows <= QUERIES else []

    def single_keys(self, assets, group):
        return EVERY

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        first = (m - n + np.arange(len(ends(n, m))) * QUERIES) // self.segment * self.segment  # key that a block's own segments begin at
        whole = m // self.segment * self.segment
        keys, seen = np.arange(m), np.arange(m) < ends(n, m)[:, None]
        columns = np.repeat((keys >= first[:, None])[None] & seen, len(q), 0)
        if whole:
            order, allowed = self._order(q, k, scale)[:whole], np.arange(0, whole, PAGE) < first[:, None]
            estimate = softmax(np.where(allowed, pool(q, QUERIES) @ pool(k[order], PAGE).T * scale, -np.inf))
            columns[..., order] |= spread(cover(estimate, allowed, self.tau), whole)
        return np.logical_and.reduceat(columns | ~seen, keys[::PAGE], 2), columns

    def _order(self, q, k, scale):
        """[m]: the keys, of each segment those with the highest scores first."""
        n, m = q.shape[1], len(k)
        scores = true_weights(q, k, np.arange(max(0, n - self.rows), n), scale).mean((0, 1))
        return np.lexsort((-scores, np.arange(m) // self.segment))
