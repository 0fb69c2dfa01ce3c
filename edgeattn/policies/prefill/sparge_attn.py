"""SpargeAttn (arXiv 2502.18137), its first stage: pages by the mean of their keys, where a mean speaks for them.

Keys lose their mean over the text. A query block and a page are stood for by their means, if their tokens are alike: if the average cosine of all
pairs within passes `similarity`. Pages of unlike keys are always read, and blocks of unlike queries read everything. Of the
other pages a block reads the best, by number or until a part of the softmax over these is covered.

The paper's blocks are of 128 queries and 64 keys. Its second stage, which leaves out the values of a page whose scores lie far below the
maximum so far, belongs to the kernel.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, best, causal, cover, pool, softmax


@dataclass(frozen=True)
class SpargeAttn(PrefillPolicy):
    """
    mode        topk or cdf
    fraction    topk: of the pages that a query block sees
    cdf         cdf: part of the estimated weight that is covered; the paper has 0.98 with a similarity of 0.6
    similarity  least average cosine of tokens that are stood for by their mean; below 0 a mean is always trusted, at 1 never
    """
    mode: str = "topk"
    fraction: float = 0.5
    cdf: float = 0.98
    similarity: float = -0.1

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("topk", "cdf"):
            raise ValueError(f"mode must be topk or cdf, got {self.mode!r}")

    def choose(self, q, k, scale, layer, head, assets):
        allowed = causal(q.shape[1], len(k))
        k = k - k.mean(0)
        unlike_rows, unlike = self_similarity(q, QUERIES) <= self.similarity, self_similarity(k, PAGE) <= self.similarity
        trusted = np.broadcast_to(allowed & ~unlike, (len(q), *allowed.shape))
        weights = softmax(np.where(trusted, pool(q, QUERIES) @ pool(k, PAGE).T * scale, -np.inf))
        if self.mode == "cdf":
            found = cover(weights, trusted, self.cdf)
        else:
            found = best(weights, trusted, np.broadcast_to(np.ceil(self.fraction * allowed.sum(1)), trusted.shape[:2]))
        return found | unlike | unlike_rows[..., None]


def self_similarity(x: np.ndarray, size: int) -> np.ndarray:
    """Mean cosine of all pairs of rows in each `size` of them, a row with itself among these; that is the squared length of the mean of the
    rows' directions. [..., rows, d] -> [..., blocks], at most 1"""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.minimum(np.square(pool(x / np.where(length > 0, length, 1), size)).sum(-1), 1)
