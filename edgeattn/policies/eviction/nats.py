"""Keep what learned token types say is alive (Neural Attention Search, arXiv 2502.13251). The score is 1 for live tokens, 0 for freeable.

A global token lives on, a local one until the next global arrives, a window one for `window` further tokens. Types come from a trained
model, per KV head: the live set depends on types and positions alone.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GLOBAL, LOCAL, WINDOW = range(3)


@dataclass(frozen=True)
class Nats:
    types: Callable | None = None    # HeadView -> [heads, slots] uint8: GLOBAL, LOCAL or WINDOW for each cached token
    window: int = 256                # tokens

    mass, probes = "", 0

    def __post_init__(self):
        if self.types is None:
            raise ValueError("nats needs types=, a function from a HeadView to the types of its tokens, from a model trained for it")

    def scores(self, heads):
        types, positions = self.types(heads), heads.positions
        last_global = np.where(types == GLOBAL, positions, -1).max(axis=1, keepdims=True)
        freeable = (types == LOCAL) & (positions < last_global) | (types == WINDOW) & (heads.length - 1 - positions >= self.window)
        return (~freeable).astype(np.float32)
