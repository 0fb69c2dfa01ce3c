"""A baseline for the others. The score is a uniform random number that belongs to the token.

A token draws once, so every kept set is a uniform sample of all tokens seen; new draws at each call would favour recent tokens.
"""
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Random:
    seed: int = 0

    mass, probes = "", 0

    def scores(self, heads):
        # A longer sequence continues the same stream: earlier tokens keep their number.
        return np.random.default_rng((self.seed, heads.layer)).random(heads.length, np.float32)[heads.positions]
