"""SALE (arXiv 2505.24179): pages in which a score, estimated from 4-bit queries and keys, stands out against what is read anyhow.

The first page and the newest ones, which are always read, give each row an exact sum of exponentials. A page is read for a block of queries
when, for any of its pairs, the exponential of the estimated score exceeds `threshold` times that sum (the paper's relative attention
score). That sum is known before the scan, so the order of the scan does not matter.

Before they are rounded, queries lose their mean and keys theirs: what the queries' mean scores with a key is added again, unrounded; what
the keys' mean scores is the same for all keys of a row and cancels. Four bits are integers from -7 to 7 with one step for each token: the
paper's finer groups follow the registers of its GPU kernel. Means are those of a chunk's queries and of its first keys, for the whole
prompt is not there yet. The scan is an operator of all queries with all keys (edgeattn/reference/score_excess.py), in bytes: 8 bits take no
longer than 4 there. The paper's exact window of 128 tokens is our query block with two pages before it; it has segments of four pages to
suit its kernel, we none. Prompts of 1,024 tokens and less, which it reads whole, are for the caller to leave alone.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.calibration import load_heads
from edgeattn.kernels_cpu import score_excess
from edgeattn.page_sums import PageSums
from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import LayerKeys, causal, forced, partial_softmax

NAME = "sale_thresholds"  # [layers, heads] float32 of calibration.safetensors
DENSE = 1e-5  # a head whose threshold lies below reads everything


@dataclass(frozen=True)
class Sale(PrefillPolicy):
    """
    threshold  of all heads, where there is no calibration or it is not the default
    bits       4 or 8, of the scan's queries and keys
    A calibrated threshold is relative to the pages that are always read by default (`sink`, `recent`).
    Assets: sale_thresholds [layers, heads]. ValueError: other bits.
    """
    threshold: float = 0.004
    bits: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {self.bits}")

    def operators(self):
        return [("choose_by_excess", {"sink": self.sink, "recent": self.recent, "threshold": float(self.threshold)})]

    def select(self, q, k, scale, layer=0, assets=None):
        keys, (heads, n, _) = LayerKeys.of(k).stored(), q.shape
        threshold = np.full(heads, self.threshold) if assets is None else assets[NAME][layer][:heads]
        m, dense = len(keys), threshold < DENSE
        always, mean = forced(n, m, self.sink, self.recent), keys.mean(n)
        found = np.zeros((heads, *always.shape), bool)
        scanned = np.flatnonzero((causal(n, m) & ~always).any(0))
        if len(scanned):
            first, last = scanned[0], scanned[-1] + 1
            top, total = reference(q, keys, mean, scale, always)
            limits = top + np.log(np.where(dense, 1, threshold)[:, None] * total)
            excess = score_excess.run(q, keys.pages(first, last), q.mean(1), mean, limits, scale, self.bits)
            found[..., first:last] = excess > 0
        return self.plan(found | dense[:, None, None], None, n, m)

    def load(self, folder, config):
        found = None if self.threshold != Sale.threshold else load_heads(folder, config, NAME)
        return None if found is None else {NAME: np.ascontiguousarray(found, np.float32)}

    @classmethod
    def calibrate(cls, q: list, k: list, v: list, scale: float, start: float = 0.008, error: float = 0.4,
                  **options) -> dict[str, np.ndarray]:
        """Thresholds of one layer's heads, from chunks of the size that is used: halved from `start` until a row's output differs by less
        than `error` (in the unit of the values, summed over channels) on the average of every prompt; at 1e-4 the head is left dense.
        Of each prompt q [heads, n, d], k, v [kv_heads, m, d] -> {"sale_thresholds": [heads]}"""
        thresholds, policy = np.full(len(q[0]), start, np.float32), cls(**options)
        for queries, keys, values in zip(q, k, v, strict=True):
            sums, wrong = PageSums(queries, keys, values, scale), True
            while np.any(wrong):
                plan = policy.select(queries, keys, scale, 0, {NAME: thresholds[None]})
                wrong = np.abs(sums.outputs(plan.blocks) - sums.dense).sum(2).mean(1) >= error
                wrong &= thresholds > 0
                thresholds[wrong] /= 2
                thresholds[thresholds <= 1e-4] = 0
        return {NAME: thresholds}


def reference(q: np.ndarray, keys, mean: np.ndarray, scale: float, always: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """partial_softmax of every head over the pages that are always read, of keys less the mean. -> two of [heads, n]"""
    kept = np.flatnonzero(always.any(0))
    before = int(np.argmax(np.append(np.diff(kept) > 1, True))) + 1  # pages before those that nobody is sure to read
    after, group = kept[-1] + 1 - (len(kept) - before), len(q) // len(mean)
    found = []
    for head in range(len(mean)):
        near = np.concatenate([keys.floats(head, 0, before), keys.floats(head, after, always.shape[1])]) - mean[head]
        found.append(partial_softmax(q[head * group:(head + 1) * group], near, scale, always[:, kept]))
    return tuple(np.concatenate(x) for x in zip(*found))
