"""Keep the tokens whose removal would change the attention output most (CAOTE, arXiv 2504.14051), on top of another policy's scores.

With the base's scores as attention weights a and output o = sum a_j v_j, removing token j and renormalising moves the output by exactly
a_j / (1 - a_j) * ||o - v_j||: that distance is the score. With `fast`, the plain mean of the values stands for o (FastCAOTE).
"""
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgeattn.policies import load_policy

CERTAIN = 1e30  # score of a token that holds all the weight: nothing is left to renormalise, and the closed form is 0 / 0


@dataclass(frozen=True)
class Caote:
    base: str = "snapkv"
    options: dict | None = None    # of the base
    fast: bool = False

    def __post_init__(self):
        self._base  # an unknown base fails here, not when memory is full

    @cached_property
    def _base(self):
        return load_policy("eviction", self.base, self.options)

    @property
    def mass(self):
        return self._base.mass

    @property
    def probes(self):
        return self._base.probes

    def scores(self, heads):
        values = heads.values()
        weights = np.asarray(distribution(self._base.scores(heads)), like=values)  # the base may have read mass, which lies on the host
        out = values.mean(axis=1, keepdims=True) if self.fast else weights[:, None].astype(np.float32) @ values
        distance = np.linalg.norm(out - values, axis=2)
        rest = 1 - weights
        return np.where(rest < 1e-6, CERTAIN, weights / np.maximum(rest, 1e-6) * distance).astype(np.float32)


def distribution(scores):
    """[heads, slots] scores as float64 weights that sum to 1 over slots: proportional, or softmax where scores can be negative."""
    scores = scores.astype(np.float64)
    if (scores < 0).any():
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    total = scores.sum(axis=1, keepdims=True)
    return np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / scores.shape[1])  # no attention probed yet: uniform
