"""FlexPrefill (arXiv 2502.20766): each head, for each prompt, has one of two patterns, and reads what covers `gamma` of its estimated
weight.

The true weights of the last queries, by page, are compared with those that means of queries and keys estimate. Where both agree (root of
the Jensen-Shannon divergence, in nats, below `tau`) the estimate is trusted for all query blocks: the pages of largest weight in the
whole map, until they hold `gamma` of it. Elsewhere these queries' keys and distances stand for all. Pages and bands of distances are 32
wide, and the last queries are a block of 64 and the chunk's, where the paper has 128, 128 and the prompt's; and it is pages and bands
that cover `gamma`, where the paper takes as many as the tokens that do would fill, were they side by side.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, best, by_distance, causal, cover, pool, slash_pages, softmax, spread, true_weights


@dataclass(frozen=True)
class FlexPrefill(PrefillPolicy):
    """gamma   part of the weight to be covered
    tau     up to which divergence the estimate is trusted; 0: never
    budget  tokens that pages, and bands of distances, have at least
    """
    gamma: float = 0.9
    tau: float = 0.1
    budget: int = 512

    def operators(self):
        about = {"sink": self.sink, "recent": self.recent, "sampled": QUERIES, "apart": 1, "segment": 0, "fewest": -(-self.budget // PAGE)}
        parts = {"part_down": float(self.gamma), "part_across": float(self.gamma), "below": float(self.tau ** 2)}
        return [("choose_by_samples", about | parts)]

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        rows, starts = np.arange(max(0, n - QUERIES), n), np.arange(0, m, PAGE)
        weights, means = true_weights(q, k, rows, scale), pool(k, PAGE).T
        pages, bands = (np.add.reduceat(x, starts, 1) / len(rows) for x in (weights.sum(1), by_distance(weights, m - n + rows)))
        blocks, least = (self._vertical_slash(pages, bands, gamma, n, m) for gamma in (self.gamma, 0))
        trusted = divergence(softmax(q[:, rows].mean(1) @ means * scale), pages) < self.tau ** 2
        if trusted.any():
            allowed = causal(n, m)
            estimate = softmax(np.where(allowed, pool(q[trusted], QUERIES) @ means * scale, -np.inf))
            found = cover(estimate.reshape(len(estimate), -1), allowed.ravel(), self.gamma).reshape(estimate.shape)
            blocks[trusted] = found | least[trusted]
        return blocks

    def _vertical_slash(self, pages, bands, gamma, n, m):
        everywhere, least = np.ones(pages.shape[1], bool), -(-self.budget // PAGE)
        verticals, slashes = (cover(x, everywhere, gamma) | best(x, everywhere, least) for x in (pages, bands))
        return verticals[:, None] | slash_pages(spread(slashes, m), n, m)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of distributions over the last axis, in nats."""
    middle = (p + q) / 2
    parts = (x * np.log(np.where(x > 0, x, 1) / np.where(x > 0, middle, 1)) for x in (p, q))
    return np.maximum(sum(parts).sum(-1) / 2, 0)  # rounding makes less than nothing of equals
