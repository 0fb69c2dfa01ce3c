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

from edgeattn.calibration import load_heads
from edgeattn.page_sums import PageSums
from edgeattn.policies.prefill import PrefillPolicy, double_bits
from edgeattn.prefill_plan import PAGE, QUERIES, best, causal, cover, pool, softmax

ROUNDED = 30          # powers of 2 below a maximum: what is left out there no sum of 32 bits would show, so that a GPU need not
NAME = "sparge_attn"  # [layers, heads, 2] float32 of calibration.safetensors: similarity, cdf


@dataclass(frozen=True)
class SpargeAttn(PrefillPolicy):
    """
    mode        topk or cdf
    fraction    topk: of the pages that a query block sees
    cdf         cdf: part of the estimated weight that is covered; the paper has 0.98 with a similarity of 0.6
    similarity  least average cosine of tokens that are stood for by their mean; below 0 a mean is always trusted, at 1 never
    skip        powers of 2 below the maximum, from which on 128 keys are left out of a row; 50, as the paper has it, leaves out next to
                none
    `mode` to `similarity` are for heads that are not calibrated, and for all heads where one of them is not the default.
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

    def operators(self):
        if self.skip < ROUNDED:
            return []
        fraction = double_bits(self.fraction if self.mode == "topk" else -1.0)
        return [("choose_by_likeness", {"sink": self.sink, "recent": self.recent, "similarity": float(self.similarity),
                                        "part": float(self.cdf), "fraction": fraction, "trusts": int(self.similarity < 0)})]

    def choose(self, q, k, scale, layer, head, assets):
        group, allowed, estimates = len(q), causal(q.shape[1], len(k)), estimate(q, k, scale)
        if assets is not None:
            return covering(*estimates, allowed, *assets[NAME][layer, head * group:(head + 1) * group].T)
        similarity = np.full(group, self.similarity, np.float32)
        if self.mode == "cdf":
            return covering(*estimates, allowed, similarity, np.full(group, self.cdf))
        weights, trusted, always = trust(*estimates, allowed, similarity)
        return best(weights, trusted, np.broadcast_to(np.ceil(self.fraction * allowed.sum(1)), trusted.shape[:2])) | always

    def load(self, folder, config):
        own = all(getattr(self, name) == getattr(SpargeAttn, name) for name in ("mode", "fraction", "cdf", "similarity"))
        found = load_heads(folder, config, NAME, 2) if own else None
        return None if found is None else {NAME: found}

    @classmethod
    def calibrate(cls, q: list, k: list, v: list, scale: float, error: float = 0.07, least: float = 0.1,
                  similarities=tuple(np.arange(16) / 16), **options) -> dict[str, np.ndarray]:
        """Similarity and cdf of one layer's heads, from chunks of the size that is used: of the pairs that keep the outputs within
        `error` of the exact ones, relative and summed over rows and channels, on every prompt, the one that reads the fewest pages. For
        each similarity the least cdf is found by halving an interval. A head that would leave out no more than `least` of its pages reads
        everything. Of each prompt q [heads, n, d], k, v [kv_heads, m, d] -> {"sparge_attn": [heads, 2]}"""
        policy, heads, prompts = cls(**options), len(q[0]), []
        for queries, keys, values in zip(q, k, v, strict=True):
            group = heads // len(keys)
            estimates = [estimate(queries[i * group:(i + 1) * group], own, scale) for i, own in enumerate(keys)]
            prompts.append((queries.shape[1], keys.shape[1], PageSums(queries, keys, values, scale), estimates))

        def tried(similarity, cdf):
            """Of each pair and head: the largest error, and the part of the pages that is read."""
            errors, read = [], []
            for n, m, sums, estimates in prompts:
                allowed, group = causal(n, m), heads // len(estimates)
                parts = [(slice(None), slice(i * group, (i + 1) * group)) for i in range(len(estimates))]
                found = np.concatenate([covering(*x, allowed, similarity[part], cdf[part]) for x, part in zip(estimates, parts)], 1)
                found = policy.plan(found, None, n, m).blocks
                errors.append(np.abs(sums.outputs(found) - sums.dense).sum((2, 3)) / np.abs(sums.dense).sum((1, 2)))
                read.append(found.sum((2, 3)) / allowed.sum())
            return np.max(errors, 0), np.mean(read, 0)

        similarity = np.repeat(np.float32(similarities)[:, None], heads, 1)
        low, high = np.zeros_like(similarity), np.ones_like(similarity)
        for _ in range(10):
            middle = (low + high) / 2
            wrong = tried(similarity, middle)[0] >= error
            low, high = np.where(wrong, middle, low), np.where(wrong, high, middle)
        found, fewest = np.ones((heads, 2), np.float32), np.full(heads, 1 - least)
        for pair, read in zip(np.stack([similarity, high], 2), tried(similarity, high)[1]):
            found[read < fewest] = pair[read < fewest]
            fewest = np.minimum(fewest, read)
        return {NAME: found}


def estimate(q: np.ndarray, k: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(self-similarity of query blocks [group, query blocks], of pages [pages], scores of their means [group, query blocks, pages])"""
    k = k - k.mean(0)
    return self_similarity(q, QUERIES), self_similarity(k, PAGE), pool(q, QUERIES) @ pool(k, PAGE).T * np.float32(scale)


def trust(rows, pages, scores, allowed, similarity) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(softmax over the pages that their means stand for, which these are, what is always read), three of [..., group, query blocks,
    pages]. The first three: what `estimate` gave; similarity [..., group]"""
    unlike = (pages <= similarity[..., None])[..., None, :]
    trusted = allowed & ~unlike
    return softmax(np.where(trusted, scores, -np.inf)), trusted, unlike | (rows <= similarity[..., None])[..., None]


def covering(rows, pages, scores, allowed, similarity, part) -> np.ndarray:
    """[..., group, query blocks, pages] bool: the pages that cover a `part` [..., group] of what is trusted, and those always read."""
    weights, trusted, always = trust(rows, pages, scores, allowed, similarity)
    return cover(weights, trusted, np.broadcast_to(part[..., None], weights.shape[:-1])) | always


def self_similarity(x: np.ndarray, size: int) -> np.ndarray:
    """Mean cosine of all pairs of rows in each `size` of them, a row with itself among these; that is the squared length of the mean of the
    rows' directions. [..., rows, d] -> [..., blocks], at most 1"""
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.minimum(np.square(pool(x / np.where(length > 0, length, 1), size)).sum(-1), 1)
