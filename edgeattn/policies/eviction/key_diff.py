"""Keep distinctive keys (KeyDiff, arXiv 2504.15364). The score is minus the cosine between a key and the mean of the normalised keys."""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class KeyDiff:
    mass, probes = "", 0

    def scores(self, heads):
        unit = normalised(heads.keys())
        return -(unit * normalised(unit.mean(axis=1))[:, None]).sum(axis=2)


def normalised(x):
    """x with rows of length 1 along the last axis; zero rows stay zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-20))
