"""How the layers share a budget. At the first eviction of a sequence the pages of all layers are shared in proportion to a rule's weights;
their sum, and so the memory, stays what it was."""
from dataclasses import dataclass

import numpy as np

from edgeattn.page_formats import PAGE

MOST = 2  # a layer gets at most this many times its even share, so that page lists stay short


@dataclass(frozen=True)
class ZipVL:
    """Layers whose attention is spread more widely keep more (ZipVL, arXiv 2410.08584): a layer needs the fewest tokens that together
    receive `tau` of its attention."""
    tau: float = 0.975

    mass, probes = "sum", 64

    def __post_init__(self):
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be above 0 and at most 1, got {self.tau}")

    def tokens(self, mass: np.ndarray) -> int:
        """mass [tokens], attention received -> how many tokens the layer needs."""
        if self.tau == 1:
            return len(mass)
        reached = np.cumsum(np.sort(mass.astype(np.float64))[::-1])
        return min(int(np.searchsorted(reached, self.tau * reached[-1])) + 1, len(mass))

    def weights(self, sequence, full: np.ndarray) -> np.ndarray:
        """[layers], from the heads that `full` [layers, kv_heads] names."""
        return np.array([self._needed(sequence, layer, np.flatnonzero(heads)) for layer, heads in enumerate(full)])

    def _needed(self, sequence, layer, heads):
        if not len(heads):
            return 1
        count = sequence.counts[layer, heads[0]]  # the same for all: nothing was evicted yet
        positions, mass = sequence.positions[layer, heads, :count], sequence.mass[0, layer, heads, :count]
        return self.tokens(np.bincount(positions.ravel(), mass.ravel()))


@dataclass(frozen=True)
class Cascade:
    """Deeper layers keep less, in equal steps (SpAtten's cascade, arXiv 2012.09852): the first `first` times its even share, the last
    `last` times."""
    first: float = 1.5
    last: float = 0.5

    mass, probes = "", 0

    def weights(self, sequence, full: np.ndarray) -> np.ndarray:
        return np.linspace(self.first, self.last, len(full))


RULES = {"zipvl": ZipVL(), "cascade": Cascade()}


def share_limits(cache, sequence, rule=None) -> np.ndarray:
    """[layers, kv_heads] tokens that each head may hold from now on; streaming heads keep their limits."""
    plan, options = cache.plan, cache.options
    rule = rule or RULES[options.layer_budget]
    full = np.ones(cache.shape, bool) if plan.classes is None else plan.classes
    if not full.any():
        return plan.limits
    unit = cache.storage.group if options.quantised else 1  # quantised pages come in groups
    even = int(plan.limits[full][0]) // PAGE
    floor = even - max(0, even - (2 + options.window // PAGE)) // unit * unit  # sinks and what is behind them, the window, a page to fill
    needed = rule.weights(sequence, full)
    steps = share(needed, full.sum(1), (even - floor) // unit, floor / unit, (plan.most // PAGE - floor) // unit)
    return np.where(full, PAGE * (floor + unit * steps[:, None]), plan.limits)


def share(weights: np.ndarray, heads: np.ndarray, even: int, floor: float, most: int) -> np.ndarray:
    """[layers] whole steps from 0 to `most`, sum(steps * heads) <= even * sum(heads), so that floor + steps is as nearly proportional to
    `weights` as that allows. Equal weights get `even` each.

    weights, heads  [layers]: what a layer needs; how many heads share its steps
    """
    total, weights = even * int(heads.sum()), np.maximum(weights, 1e-9)
    low, high = 0.0, (floor + most + 1) / weights.min()
    for _ in range(80):
        middle = (low + high) / 2
        if np.clip(middle * weights - floor, 0, most) @ heads <= total:
            low = middle
        else:
            high = middle
    ideal = np.clip(low * weights - floor, 0, most)
    steps = np.floor(ideal + 1e-6).astype(np.int64)
    left = total - int(steps @ heads)
    for layer in np.argsort(steps - ideal, kind="stable"):
        if 0 < heads[layer] <= left and steps[layer] < most:
            steps[layer] += 1
            left -= int(heads[layer])
    return steps
