"""AnchorAttention (arXiv 2505.23520): single keys whose score comes within `theta` of what the first and the newest keys reach.

A row's greatest score with the first pages and with the keys of its own superblock of queries is its anchor. Queries and anchors are
averaged over a query block. An earlier key is read by a whole superblock if for any of its blocks the mean query's score with it, plus
theta, is no less than the mean anchor: no softmax, no sorting, and keys are read alone.

The paper averages over 128 queries and has superblocks of 16 such; ours end with the chunk: 8 query blocks are the usual one of 512 tokens.
First pages, the superblock's keys and the scanned ones between share no key.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import EVERY, PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, causal, partial_softmax, pool, shape_of, spread


@dataclass(frozen=True)
class Anchor(PrefillPolicy):
    """
    theta  how far below the anchor a score may lie, in natural logarithms of a weight
    step   query blocks of a superblock
    """
    theta: float = 12.0
    step: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.step < 1:
            raise ValueError(f"need step >= 1 query blocks, got {self.step}")

    def operators(self):
        about = {"sink": self.sink, "recent": self.recent, "step": min(self.step, EVERY), "theta": float(self.theta)}
        return [("choose_by_anchors", about)]

    def single_keys(self, assets, group):
        return EVERY

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        blocks, pages = shape_of(n, m)
        superblocks = np.arange(0, blocks, self.step)
        start = np.repeat((m - n + superblocks * QUERIES) // PAGE - self.recent, self.step)[:blocks, None]  # page where its own keys begin
        region = ((np.arange(pages) < self.sink) | (np.arange(pages) >= start)) & causal(n, m)
        anchors = pool(partial_softmax(q, k, scale, region)[0][..., None], QUERIES)
        near = pool(q, QUERIES) @ k.T * scale + self.theta >= anchors
        near = np.repeat(np.logical_or.reduceat(near, superblocks, 1), self.step, 1)[:, :blocks]
        between = (np.arange(pages) >= self.sink) & (np.arange(pages) < start)
        return np.broadcast_to(region, (len(q), blocks, pages)), near & spread(between, m)
