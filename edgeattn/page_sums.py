"""What each page of keys adds to a chunk's outputs, so that outputs of one more plan cost little: for calibrations, which try many."""
import numpy as np

from edgeattn.prefill_plan import PAGE, QUERIES, shape_of


class PageSums:
    """
    q     [heads, n, d] float32, rotated: a chunk's queries
    k, v  [kv_heads, m, d] float32: all keys and values so far, the chunk's own among them
    dense [heads, n, d] float32: the outputs where everything is read
    Takes (d + 1) / 32 times the memory of the chunk's scores.
    """

    def __init__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float):
        (heads, n, _), m = q.shape, k.shape[1]
        self._n, self._shape = n, (heads, *shape_of(n, m))
        self._sums = np.empty((*self._shape, QUERIES * (v.shape[2] + 1)), np.float32)  # values and weights of a page's keys, weighted
        seen = np.arange(m) <= np.arange(n)[:, None] + m - n
        for head in range(heads):
            own = head * len(k) // heads
            scores = np.where(seen, q[head] @ k[own].T * np.float32(scale), -np.inf)
            weights = np.pad(np.exp(scores - scores.max(1, keepdims=True)), ((0, -n % QUERIES), (0, -m % PAGE)))
            values = np.pad(np.concatenate([v[own], np.ones((m, 1), np.float32)], 1), ((0, -m % PAGE), (0, 0)))
            weights = weights.reshape(self._shape[1], QUERIES, -1, PAGE).swapaxes(1, 2)
            self._sums[head] = (weights @ values.reshape(-1, PAGE, values.shape[1])).reshape(*self._shape[1:], -1)
        self.dense = self.outputs(np.ones(self._shape, bool))

    def outputs(self, blocks: np.ndarray) -> np.ndarray:
        """blocks [..., heads, query blocks, pages] bool, of one plan or more -> [..., heads, n, d] float32"""
        plans = blocks.reshape(-1, *self._shape).astype(np.float32).transpose(1, 2, 0, 3)
        sums = (plans @ self._sums).reshape(*plans.shape[:3], QUERIES, -1).transpose(2, 0, 1, 3, 4)
        sums = sums.reshape(len(sums), self._shape[0], -1, sums.shape[-1])[:, :, :self._n]
        out = sums[..., :-1] / np.maximum(sums[..., -1:], np.finfo(np.float32).tiny)
        return out.reshape(*blocks.shape[:-3], *out.shape[1:])
