"""Policies that choose which keys the queries of a prompt read, one file each."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.prefill_plan import PrefillPlan, causal, ends, forced, spread

EVERY = 1 << 30  # more tokens than there are


def double_bits(x: float) -> int:
    """A number for an operator that must find what Python's floats give; floats among its attributes are rounded to float32."""
    return int(np.float64(x).view(np.int64))


@dataclass(frozen=True)
class PrefillPolicy:
    """A method that is asked, for each layer and chunk of a prompt, what to read. Fields are options:

    sink    first pages that are always read
    recent  pages before a query block's own that are always read

    A method writes `choose` (a KV head at a time) or `select` (all of a layer). ValueError: a number out of range.
    """
    sink: int = 1
    recent: int = 2

    reference: ClassVar[bool] = False  # an end of the scale, not a method
    min_len: ClassVar[int] = 1024      # tokens in the context below which chunks are read whole
    correction: ClassVar[str] = "none"  # a function of prefill_corrections.py, where the user asks for no other
    unrotates: ClassVar[bool] = False  # whether it looks at keys as they were before rotary embedding
    skip: ClassVar[float] = 1e30        # powers of 2 below a row's largest weight so far at which a page's largest is left out

    def __post_init__(self):
        if self.sink < 1 or self.recent < 0:
            raise ValueError(f"need sink >= 1 and recent >= 0 pages, got {self.sink=} {self.recent=}")

    def choose(self, q: np.ndarray, k: np.ndarray, scale: float, layer: int, head: int, assets):
        """Pages for the query heads of one KV head, before the forced ones are added and those that nobody sees taken away.

        q       [group, n, head_dim] float32, rotated: a chunk's queries
        k       [m, head_dim] float32, rotated: all keys so far, the chunk's own (the last n) among them
        assets  what `load` gave
        ->      blocks [group, query blocks, pages] bool, or (blocks, columns [group, query blocks, m] bool)
        """
        raise NotImplementedError

    def select(self, q: np.ndarray, k: Sequence[np.ndarray], scale: float, layer: int = 0, assets=None) -> PrefillPlan:
        """The plan of a layer. q [heads, n, head_dim]; k: of each KV head [m, head_dim], expanded when it is asked for."""
        group, found = len(q) // len(k), []
        for head in range(len(k)):
            keys = k[head]
            found.append(self.choose(q[head * group:(head + 1) * group], keys, scale, layer, head, assets))
            count = len(keys)
        blocks, columns = (zip(*found) if isinstance(found[0], tuple) else (found, None))
        return self.plan(np.concatenate(blocks), None if columns is None else np.concatenate(columns), q.shape[1], count)

    def plan(self, blocks: np.ndarray, columns: np.ndarray | None, n: int, m: int) -> PrefillPlan:
        """With the forced pages and without what nobody sees. [heads, query blocks, pages], [heads, query blocks, m]"""
        blocks = blocks & causal(n, m) | forced(n, m, self.sink, self.recent)
        return PrefillPlan(blocks, None if columns is None else columns & ~spread(blocks, m) & (np.arange(m) < ends(n, m)[:, None]), n, m)

    def operators(self) -> list[tuple[str, dict]]:
        """What chooses the same on a GPU, before a layer's attention: kernels of kernels_cuda and their attributes. None: the CPU alone
        has it."""
        return []

    def single_keys(self, assets, group: int) -> int:
        """Single keys that the query heads of a KV head, `group` of them, read at most. assets: what `load` gave."""
        return 0

    def device_assets(self, assets) -> dict[str, np.ndarray]:
        """Those of the arrays that `load` gave which `operators` read."""
        return assets or {}

    def tokens(self, seen: int) -> int | None:
        """How many tokens a block of queries reads of `seen`; None where that depends on what they are."""

    def load(self, folder, config: dict):
        """What the method needs of the model's calibration, by name, or None. ValueError: the model lacks it."""

    def of_head(self, assets, head: int, group: int):
        """What `load` gave, as `select` takes it for the query heads of one KV head alone."""
        return assets and {name: x[:, head * group:(head + 1) * group] for name, x in assets.items()}
