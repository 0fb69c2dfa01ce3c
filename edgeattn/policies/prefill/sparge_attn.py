"""SpargeAttn (arXiv 2502.18137): pages by the mean of their keys, where a mean speaks for them.

Keys lose their mean over the text. A query block and a page are stood for by their means, if their tokens are alike: if the average cosine
of all pairs within passes `similarity`. Pages of unlike keys are always read, and blocks of unlike queries read everything. Of the other
pages a block reads the best, by number or until a part of the softmax over these is covered.

In a second stage the kernel leaves out the values of keys whose scores lie far below a row's maximum so far.

Calibrated heads cover a part, each with a similarity and a part of its own. The paper's blocks are of 128 queries and 64 keys, and its
calibration smooths what it compares, and tunes the threshold of the second stage too.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, PrefillPlan, attend, best, causal, cover, pool, shape_of, softmax


@dataclass(frozen=True)
class SpargeAttn(PrefillPolicy):
    """
    mode        topk or cdf
    fraction    topk: of the pages that a query block sees
    cdf         cdf: part of the estimated weight that is covered; the paper has 0.98 with a similarity of 0.6
    similarity  least average cosine of tokens that are stood for by their mean; below 0 a mean is always trusted, at 1 never
    skip        powers of 2 below the maximum, from which on 128 keys are left out of a row; 50, as the paper has it, leaves out next to none
    Assets: sparge_attn [layers, heads, 2], similarity and cdf
    """
    mode: str = "topk"
    fraction: float = 0.5
    cdf: float = 0.98
    similarity: float = -0.1
    skip: float = 50.0

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("topk", "cdf"):
            raise ValueError(f"mode must be topk or cdf, got {self.mode!r}")

    def choose(self, q, k, scale, layer, head, assets):
        group, allowed = len(q), causal(q.shape[1], len(k))
        similarity, part = np.full((2, group, 1), [[[self.similarity]], [[self.cdf]]])
        if assets is not None:
            similarity, part = assets["sparge_attn"][layer, head * group:(head + 1) * group].T[..., None]
        k = k - k.mean(0)
        unlike_rows = (self_similarity(q, QUERIES) <= similarity)[..., None]
        unlike = (self_similarity(k, PAGE) <= similarity)[:, None]
        trusted = allowed & ~unlike
        weights = softmax(np.where(trusted, pool(q, QUERIES) @ pool(k, PAGE).T * scale, -np.inf))
        if self.mode == "cdf" or assets is not None:
            found = cover(weights, trusted, np.broadcast_to(part, weights.shape[:2]))
        else:
            found = best(weights, trusted, np.broadcast_to(np.ceil(self.fraction * allowed.sum(1)), trusted.shape[:2]))
        return found | unlike | unlike_rows

    @classmethod
    def calibrate(cls, q: list, k: list, v: list, scale: float, error: float = 0.07, least: float = 0.1,
                  similarities=tuple(np.arange(16) / 16), **options) -> dict[str, np.ndarray]:
        """Similarity and cdf of one layer's heads, from chunks of the size that is used: of the pairs that keep the outputs within
        `error` of the exact ones, relative and summed over rows and channels, on every prompt, the one that reads the fewest pages. For
        each similarity the least cdf is found by halving an interval. A head that would leave out no more than `least` of its pages reads
        everything. Of each prompt q [heads, n, d], k, v [kv_heads, m, d] -> {"sparge_attn": [heads, 2]}"""
        policy, heads, exact = cls(**options), len(q[0]), []
        for queries, keys, values in zip(q, k, v, strict=True):
            n, m = queries.shape[1], keys.shape[1]
            whole = PrefillPlan(np.ones((heads, *shape_of(n, m)), bool), None, n, m)
            exact.append(attend(queries, keys, values, whole, scale)[0])

        def tried(similarity, cdf):
            """Of each head: the largest error, and the part of the pages that is read."""
            assets, errors, read = {"sparge_attn": np.stack([np.full(heads, similarity), cdf], 1)[None]}, [], []
            for queries, keys, values, right in zip(q, k, v, exact):
                plan = policy.select(queries, keys, scale, 0, assets)
                errors.append(np.abs(attend(queries, keys, values, plan, scale)[0] - right).sum((1, 2)) / np.abs(right).sum((1, 2)))
                read.append(plan.blocks.sum((1, 2)) / causal(plan.queries, plan.keys).sum())
            return np.max(errors, 0), np.mean(read, 0)

        found, fewest = np.tile(np.float32([1, 1]), (heads, 1)), np.full(heads, 1 - least)
        for similarity in similarities:
            low, high = np.zeros(heads), np.ones(heads)
            for _ in range(10):
                middle = (low + high) / 2
                wrong = tried(similarity, middle)[0] >= error
                low, high = np.where(wrong, middle, low), np.where(wrong, high, middle)
            read = tried(similarity, high)[1]
            found[read < fewest] = np.stack([np.full(heads, similarity), high], 1)[read < fewest]
            fewest = np.minimum(fewest, read)
        return {"sparge_attn": found}


def self_similarity(x: np.ndarray, size: int) -> np.ndarray:
    """Mean cosine of all pairs of rows in each `size` of them, a row with itself among these; that is the squared length of the mean of the
    rows' directions. [..., rows, d] -> [..., blocks], at most 1"""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.minimum(np.square(pool(x / np.where(length > 0, length, 1), size)).sum(-1), 1)
