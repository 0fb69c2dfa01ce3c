"""FlexPrefill (arXiv 2502.20766): each head, for each prompt, has one of two patterns, and reads what covers `gamma` of its estimated
weight.

The true weights of the last queries, by page, are compared with those that means of queries and keys estimate. Where both agree (root of
the Jensen-Shannon divergence, in nats, below `tau`) the estimate is trusted for all query blocks: the pages of largest weight in the
whole map, until they hold `gamma` of it. Elsewhere these queries' keys and distances stand for all. Pages and bands of distances are 32
wide, and the last queries are a block of 64 and the chunk's, where the paper has 128, 128 and the prompt's.
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

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        rows, starts = np.arange(max(0, n - QUERIES), n), np.arange(0, m, PAGE)
        weights, means = true_weights(q, k, rows, scale), pool(k, PAGE).T
        by_key, by_slash = weights.mean(1), by_distance(weights, m - n + rows) / len(rows)
        pages, bands = (np.add.reduceat(x, starts, 1) for x in (by_key, by_slash))
        counts = np.stack([self._count(by_key), self._count(by_slash)])
        least = -(-self.budget // PAGE)
        blocks = self._vertical_slash(pages, bands, np.maximum(counts, least), n, m)
        trusted = divergence(softmax(q[:, rows].mean(1) @ means * scale), pages) < self.tau ** 2
        if trusted.any():
            allowed = causal(n, m)
            estimate = softmax(np.where(allowed, pool(q[trusted], QUERIES) @ means * scale, -np.inf))
            found = cover(estimate.reshape(len(estimate), -1), allowed.ravel(), self.gamma).reshape(estimate.shape)
            blocks[trusted] = found | self._vertical_slash(pages, bands, np.full(counts.shape, least), n, m)[trusted]
        return blocks

    def _count(self, weights):
        """Pages that as many tokens fill as cover gamma of the weight."""
        before = np.cumsum(-np.sort(-weights, 1), 1)
        tokens = (before < self.gamma * before[:, -1:]).sum(1) if self.gamma < 1 else np.full(len(weights), weights.shape[1])
        return tokens // PAGE + 1

    def _vertical_slash(self, pages, bands, counts, n, m):
        everywhere = np.ones(pages.shape[1], bool)
        return best(pages, everywhere, counts[0])[:, None] | slash_pages(spread(best(bands, everywhere, counts[1]), m), n, m)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of distributions over the last axis, in nats."""
    middle = (p + q) / 2
    return sum(x * np.log(np.where(x > 0, x, 1) / np.where(x > 0, middle, 1)) for x in (p, q)).sum(-1) / 2
