"""SALE (arXiv 2505.24179): pages in which a score, estimated from 4-bit queries and keys, stands out against what is read anyhow.

The first page and the newest ones, which are always read, give each row an exact sum of exponentials. A page is read for a block of queries
when, for any of its pairs, the exponential of the estimated score exceeds `threshold` times that sum (the paper's relative attention
score). That sum is known before the scan, so the order of the scan does not matter.

Before they are rounded, queries lose their mean and keys theirs: what the queries' mean scores with a key is added again, unrounded; what
the keys' mean scores is the same for all keys of a row and cancels. Four bits are integers from -7 to 7 with one step for each token: the
paper's finer groups follow the registers of its GPU kernel. Means of queries are a chunk's, for the whole prompt is not there yet. The
paper's exact window of 128 tokens is our query block with two pages before it; it has segments of four pages to suit its kernel, we none.
Prompts of 1,024 tokens and less, which it reads whole, are for the caller to leave alone.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, PrefillPlan, attend, causal, forced, partial_softmax, shape_of

DENSE = 1e-5  # a head whose threshold lies below reads everything
SLICE = 512   # keys that are scanned at a time: their scores stay in the processor's cache


@dataclass(frozen=True)
class Sale(PrefillPolicy):
    """threshold: of all heads, where there is no calibration. Assets: sale_thresholds [layers, heads]"""
    threshold: float = 0.004

    def choose(self, q, k, scale, layer, head, assets):
        group, m = len(q), len(k)
        threshold = np.full(group, self.threshold) if assets is None else assets["sale_thresholds"][layer, head * group:(head + 1) * group]
        dense, always = threshold < DENSE, forced(q.shape[1], m, self.sink, self.recent)
        keys = k - k.mean(0)
        top, total = partial_softmax(q, keys, scale, always)
        limit = top + np.log(np.where(dense, 1, threshold)[:, None] * total)
        scanned = np.flatnonzero((causal(q.shape[1], m) & ~always).any(0))
        found = np.zeros((group, *always.shape), bool)
        if len(scanned):
            first, last = scanned[0], scanned[-1] + 1
            found[..., first:last] = scan(q, keys[first * PAGE:last * PAGE], scale, limit)
        return found | dense[:, None, None]

    @classmethod
    def calibrate(cls, q: list, k: list, v: list, scale: float, start: float = 0.008, error: float = 0.4,
                  **options) -> dict[str, np.ndarray]:
        """Thresholds of one layer's heads, from chunks of the size that is used: halved from `start` until a row's output differs by less
        than `error` (in the unit of the values, summed over channels) on the average of every prompt; at 1e-4 the head is left dense.
        Of each prompt q [heads, n, d], k, v [kv_heads, m, d] -> {"sale_thresholds": [heads]}"""
        thresholds, policy = np.full(len(q[0]), start, np.float32), cls(**options)
        for queries, keys, values in zip(q, k, v, strict=True):
            n, m = queries.shape[1], keys.shape[1]
            whole = PrefillPlan(np.ones((len(queries), *shape_of(n, m)), bool), None, n, m)
            exact, wrong = attend(queries, keys, values, whole, scale)[0], True
            while np.any(wrong):
                plan = policy.select(queries, keys, scale, 0, {"sale_thresholds": thresholds[None]})
                wrong = np.abs(attend(queries, keys, values, plan, scale)[0] - exact).sum(2).mean(1) >= error
                wrong &= thresholds > 0
                thresholds[wrong] /= 2
                thresholds[thresholds <= 1e-4] = 0
        return {"sale_thresholds": thresholds}


def scan(q: np.ndarray, k: np.ndarray, scale: float, limit: np.ndarray) -> np.ndarray:
    """Pages of which an estimated score passes the limit of one of a query block's rows. q [group, n, d]; k [pages * PAGE, d], all of them
    seen by the blocks for which the answer counts; limit [group, n] -> [group, query blocks, pages] bool"""
    group, n, _ = q.shape
    mean = q.mean(1, keepdims=True)
    shared = (mean * scale) @ k.T                                                 # [group, 1, keys]
    rows, columns = rounded((q - mean) * scale), rounded(k)
    blocks, found = shape_of(n, 0)[0], []
    left = np.concatenate([rows, np.ones((group, n, 1), np.float32), -limit[..., None]], 2)  # the product is the score less the row's limit
    left = np.pad(left, ((0, 0), (0, blocks * QUERIES - n), (0, 0)), "edge")
    for start in range(0, len(k), SLICE):
        part = columns[start:start + SLICE]
        right = np.concatenate([np.broadcast_to(part, (group, *part.shape)), shared[:, 0, start:start + SLICE, None],
                                np.ones((group, len(part), 1), np.float32)], 2)
        scores = (left @ right.swapaxes(1, 2)).reshape(group, blocks, QUERIES, -1).max(2)
        found.append(scores.reshape(group, blocks, -1, PAGE).max(3) > 0)
    return np.concatenate(found, 2)


def rounded(x: np.ndarray) -> np.ndarray:
    """[..., tokens, d] as 4 bits hold it."""
    levels, step = quantise(x)
    return levels * step


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., tokens, d] -> integers from -7 to 7, int8, and the step of each token [..., tokens, 1] by which they are multiplied."""
    step = np.abs(x).max(-1, keepdims=True) / np.float32(7)
    return np.rint(x / np.where(step > 0, step, 1)).astype(np.int8), step
