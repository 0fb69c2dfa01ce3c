"""The delta-sparsity scheduler: what each layer of a decode step reads, and when that pays.

A policy (policies/decode) says how pages are scored; the scheduler which layers and heads choose at all, how much each may read, and from
how many tokens on. Nothing of it runs between operators: lists are made by the operators of a layer, by shares that lie in fixed memory,
and what they did is read from counters afterwards.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from edgeattn import calibration
from edgeattn.cache.budget import SelectionPlan
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu.selections import DENSE, HELD, READ, REUSED, SPARSE, STATS_FIELDS
from edgeattn.page_formats import PAGE
from edgeattn.policies import MethodOptions

ALL = -1.0      # a share: read everything
RETRIEVAL = 4.0  # the share of heads that look things up, and the part of all looking up that they stand for together
FOUND = 0.9
NEVER = 1 << 40  # tokens


@dataclass(frozen=True)
class SparseOptions(MethodOptions):
    """What decode steps read. min_len None: what was measured on this machine (crossover.py)."""
    kind: ClassVar[str] = "decode"
    what: ClassVar[str] = "sparse attention"


def refusal(policy, cache: CacheOptions, window: int) -> str:
    """Why a policy does not go with a cache (its types settled) or with a model of sliding windows; "" where it does."""
    if window:
        return "this model's layers see a window of recent tokens only"
    if cache.releases and policy.index:
        return f"--kv-eviction {cache.method} drops and rebuilds pages, whose index would not follow"
    return ""


def even_shares(scores: np.ndarray) -> np.ndarray:
    """Shares with mean 1, RETRIEVAL for the heads that FOUND of all retrieval rests on, an eighth of the heads at most. scores: what
    calibration.py measured, [layers, kv_heads]."""
    gain, shares = np.maximum(scores, 0).ravel(), np.ones(scores.size, np.float32)
    order = np.argsort(-gain, kind="stable")
    count = min(int(np.searchsorted(np.cumsum(gain[order]), FOUND * gain.sum())) + 1, scores.size // 8)
    if count and gain.sum() > 0:
        shares[:] = (scores.size - RETRIEVAL * count) / (scores.size - count)
        shares[order[:count]] = RETRIEVAL
    return shares.reshape(scores.shape)


class Scheduler:
    """What the layers of a decode step read.

    min_len   tokens in the context from which steps are sparse
    steps     how many decode steps were [dense, sparse]
    shares    [layers, kv_heads] float32: what a head may read, as a multiple of the policy's budget; ALL: everything
    stats     [layers, STATS_FIELDS] int64, counted by select_pages
    components  float32, what the policy's load() gave; None: it needs nothing
    thresholds   [layers, num_heads, 2] float32 (calibrate_thresholds.py), where the policy asks for them
    """
    def __init__(self, options: SparseOptions, layers: int, kv_heads: int, shares: np.ndarray | None = None):
        self.options, self.policy, self.shape = options, options.policy(), (layers, kv_heads)
        self.sources = self.policy.sources(layers)
        self.groups = sorted({source for source in self.sources if source is not None})
        self.shares = np.ones(self.shape, np.float32) if shares is None else np.ascontiguousarray(shares, np.float32)
        self.stats = np.zeros((layers, STATS_FIELDS), np.int64)
        self.components = self.thresholds = self._backend = None
        self.uncalibrated = "no calibration: all heads read as much (edgeattn calibrate finds those that look things up)"
        self.min_len, self.times, self.steps = options.min_len or 0, None, [0, 0]

    def load(self, folder, config: dict) -> None:
        """What the policy needs of the model's calibration, and what heads get by it. ValueError: it is not there, or another model's;
        auto does without."""
        found = self.policy.load(folder, config)
        self.components, self.thresholds = (None, found) if self.policy.thresholds else (found, None)
        if self.policy.combine != "head" or self.policy.shared or not (Path(folder) / calibration.FILE).is_file():
            return
        try:
            scores = calibration.load(folder, config)[0].get("head_scores")
        except ValueError as error:
            if self.options.method != "auto":
                raise
            self.uncalibrated, scores = str(error), None
        if scores is not None and scores.shape == self.shape:
            self.uncalibrated, self.shares = "", even_shares(scores)

    def selection_plan(self, ctx_size: int) -> SelectionPlan:
        pages = math.ceil(max(float(self.shares.max()), 0) * self.policy.tokens(ctx_size) / PAGE)
        pages = min(max(pages, self.policy.pages_always), -(-ctx_size // PAGE)) + 2
        return SelectionPlan(max(1, len(self.groups)), pages, self.policy.index, self.policy.index_size, self.policy.means)

    def prepare(self, sequences: int, max_pages: int, backend=None) -> None:
        """Memory for the scores of one layer's pages, and on a GPU for what is counted there. backend: a GPU's, None on the CPU."""
        self._backend = backend
        if backend:
            self._counters = backend.counters(self.stats.shape)
        else:
            self.scores = np.zeros((sequences, self.shape[1], max_pages), np.float32)

    def operators(self, layer: int) -> list[tuple[str, dict]]:
        """What runs before a layer's attention."""
        if layer not in self.groups:
            return []
        return [(name, about | {"group": self.groups.index(layer)}) for name, about in self.policy.operators(layer)]

    def arguments(self, layer: int) -> dict[str, int]:
        """What kernels need to reach the selection, under the names used in ARGS."""
        source = self.sources[layer]
        group = {"selection.group": -1 if source is None else self.groups.index(source)}
        dense = self.thresholds is None or layer < self.policy.dense_layers
        if self._backend:
            vectors = 0 if self.components is None else self._backend.address(self.components)
            return group | {"selection.shares": self._backend.address(self.shares), "selection.components": vectors,
                            "selection.thresholds": 0 if dense else self._backend.address(self.thresholds[layer]),
                            "selection.stats": self._backend.address(self._counters)}
        return group | {"selection.shares": self.shares.ctypes.data,
                "selection.components": 0 if self.components is None else self.components.ctypes.data,
                "selection.thresholds": 0 if dense else self.thresholds[layer].ctypes.data,
                "selection.stats": self.stats.ctypes.data, "selection.scores": self.scores.ctypes.data}

    def wants(self, tokens: int) -> bool:
        """Whether a decode step with so many tokens in the context is to be sparse; counts it."""
        sparse = tokens >= self.min_len
        self.steps[sparse] += 1
        return sparse

    def _collect(self):
        """Counters of a GPU are read only when someone asks: no step waits for them."""
        if self._backend:
            self.stats += self._backend.take_counters(self._counters)

    def figures(self) -> dict[str, float]:
        """What decode steps read since the last call: share of the pages held, over all layers; share of (layer, head) pairs that read a
        list, and of the lists that served a second step."""
        total, dense = self.counted(), sum(source is None for source in self.sources) / len(self.sources)
        self.stats[:] = 0
        lists = max(1, int(total[SPARSE] + total[DENSE]))
        return {"read": self.share_read(total), "sparse": (1 - dense) * total[SPARSE] / lists, "reused": total[REUSED] / lists}

    def counted(self) -> np.ndarray:
        """[STATS_FIELDS] int64, over all layers so far; counters go on."""
        self._collect()
        return self.stats.sum(0)

    def share_read(self, counted: np.ndarray) -> float:
        """The share of the pages held that sparse steps read, over all layers, by what was counted meanwhile."""
        dense = sum(source is None for source in self.sources) / len(self.sources)
        return dense + (1 - dense) * float(counted[READ]) / max(1, int(counted[HELD]))

    def explain(self) -> Iterator[str]:
        """What was decided and why, line by line; counters go on."""
        self._collect()
        policy = self.policy
        fields = ", ".join(f"{name} {value}" for name, value in vars(policy).items())
        yield f"sparse attention {self.options.method} ({fields})"
        if self.times:
            depths = self.times["depths"]
            yield "measured here, one layer's attention in us at " + ", ".join(
                f"{tokens:,} tokens: dense {1e6 * self.times['dense'][i]:.0f}, selection {1e6 * self.times['select'][i]:.0f}, selected "
                f"pages {1e6 * self.times['attend'][i]:.0f}" for i, tokens in enumerate(depths))
        most = np.argwhere(self.shares > 1)
        heads = ", ".join(f"layer {layer} head {head}" for layer, head in most)
        yield f"heads that look things up read {self.shares.max():g} times as much: {heads}" if len(most) else self.uncalibrated
        begins = "never" if self.min_len >= NEVER else f"from {self.min_len:,} tokens on"
        yield f"sparse steps begin {begins}; steps so far: {self.steps[0]} dense, {self.steps[1]} sparse"
        for layer, source in enumerate(self.sources):
            stats = self.stats[layer if source is None else source]
            if source is None:
                yield f"layer {layer}: reads everything" + (", and selects for others" if layer in self.groups else "")
            elif source != layer:
                yield f"layer {layer}: reads what layer {source} selected"
            elif stats[HELD]:
                yield (f"layer {layer}: read {100 * stats[READ] / stats[HELD]:.1f} % of the pages; of {stats[SPARSE] + stats[DENSE]} lists "
                       f"{stats[DENSE]} held all pages, {stats[REUSED]} served again")
            else:
                yield f"layer {layer}: selects its own"

    def read_bytes(self, cache, tokens: int) -> int:
        """What a sparse step reads in whole pages, with `tokens` in the context, its own among them: codes and parameters, and what
        bounds are made from. Of a cache that evicts nothing and whose quantised pages are all of one format."""
        pages, quantised, total = -(-tokens // PAGE), len(cache.pools) > 1, 0
        floats, sealed = cache.pools[0].format.page_bytes, cache.pools[-1].format.page_bytes
        whole = (tokens - 1) // PAGE * PAGE  # tokens when pages were last sealed
        exact = max(1, (whole - cache.options.window) // PAGE) if quantised else 1  # the first page of floats behind the first one
        last = min(pages - self.policy.recent, exact) if quantised else pages - self.policy.recent
        for layer, head in np.ndindex(cache.shape):
            share = self.shares[layer, head]
            wanted = pages if self.sources[layer] is None or share < 0 else math.ceil(share * self.policy.tokens(tokens) / PAGE)
            kept = 1 + pages - exact
            total += kept * floats + (min(wanted, pages) - kept) * sealed
            if layer in self.groups and wanted < pages and self.policy.index == "bounds":
                total += (last - 1) * 4 * cache.head_dim
        return total
