"""XAttention (arXiv 2503.16428): pages by the sums along their antidiagonals, until a part `tau` of the estimated weight is covered.

Cut queries and keys into strides of S tokens. Of the S x S pairs of two strides only those on the antidiagonal are scored: every token of
either side takes part, and lines of strong scores, down or across, are met. All those sums are one product of width S * head_dim over n / S
rows and m / S columns. Their means pass through a softmax by row, whose weights are summed over a query block and a page.

The paper's blocks are of 128 tokens, and it counts a stride's whole antidiagonal with itself; here pairs whose key comes after the query
are left out of the mean, which also serves chunks that begin within a stride.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, causal, cover, forced, softmax


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

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        weights = softmax(antidiagonals(q, k, self.stride) * scale)
        pages = np.add.reduceat(np.add.reduceat(weights, np.arange(0, weights.shape[2], PAGE // self.stride), 2),
                                np.arange(0, weights.shape[1], QUERIES // self.stride), 1)
        kept = np.broadcast_to(forced(n, m, self.sink, self.recent), pages.shape)
        return cover(pages, causal(n, m), self.tau, kept)


def antidiagonals(q: np.ndarray, k: np.ndarray, stride: int) -> np.ndarray:
    """Mean score of the pairs (last - t, first + t) of a stride of queries and one of keys, of those that the causal mask leaves.
    q [group, n, d], k [m, d] -> [group, strides of queries, strides of keys], -inf where it leaves none"""
    (group, n, depth), m = q.shape, len(k)
    rows = np.minimum(np.arange(-(-n // stride) * stride), n - 1).reshape(-1, stride)[:, ::-1]  # a part of a stride repeats the last query
    q = q[:, rows]
    k = np.pad(k, ((0, -m % stride), (0, 0))).reshape(-1, stride, depth)
    scores = q.reshape(group, len(rows), -1) @ k.reshape(len(k), -1).T / np.float32(stride)
    scores[:, np.arange(len(k)) * stride > (rows.max(1) + m - n)[:, None]] = -np.inf
    edge = np.minimum((rows.min(1) + m - n)[:, None] // stride + np.arange(2), len(k) - 1)     # strides of keys that a row may see in part
    seen = edge[..., None] * stride + np.arange(stride) <= (rows + m - n)[:, None]              # [rows, 2, stride]
    pairs = np.einsum("grtd,retd->gret", q, k[edge], optimize=True)
    counts = seen.sum(2)
    exact = np.where(counts, np.where(seen, pairs, 0).sum(3) / np.maximum(counts, 1), -np.inf)
    np.put_along_axis(scores, np.broadcast_to(edge, exact.shape), exact, 2)
    return scores
