"""The delta-sparsity scheduler: what each layer of a decode step reads, and when that pays.

A policy (policies/decode) says how pages are scored; the scheduler which layers and heads choose at all, how much each may read, and from how
many tokens on. Nothing of it runs between operators: lists are made by the operators of a layer, by shares that lie in fixed memory, and
what they did is read from counters afterwards.
"""
import math
from dataclasses import dataclass, field

import numpy as np

from edgeattn.cache.budget import SelectionPlan
from edgeattn.kernels_cpu.select_pages import DENSE, HELD, READ, REUSED, SPARSE, STATS_FIELDS
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy, policy_names

ALL = -1.0  # a share: read everything


@dataclass(frozen=True)
class SparseOptions:
    """
    method   "off", "auto" or a file of policies/decode
    options  its fields, where they are not to be the defaults
    min_len  tokens in the context from which a step is sparse; None: what was measured on this machine
    ValueError: an unknown method or field.
    """
    method: str = "off"
    options: dict = field(default_factory=dict)
    min_len: int | None = None

    def __post_init__(self):
        known = ("off", "auto", *policy_names("decode"))
        if self.method not in known:
            raise ValueError(f"sparse attention must be one of {', '.join(known)}, got {self.method!r}")
        if self.min_len is not None and self.min_len < 0:
            raise ValueError(f"sparse attention begins at 0 tokens or more, got {self.min_len}")

    def policy(self):
        """None where everything is read."""
        return None if self.method == "off" else load_policy("decode", self.method, self.options)


class Scheduler:
    """
    shares    [layers, kv_heads] float32: what a head may read, as a multiple of the policy's budget; ALL: everything
    stats     [layers, STATS_FIELDS] int64, counted by select_pages
    thresholds   [layers, num_heads, 2] float32 (calibrate_thresholds.py), where the policy asks for them
    """
    thresholds: np.ndarray | None = None

    def __init__(self, options: SparseOptions, layers: int, kv_heads: int, shares: np.ndarray | None = None):
        self.options, self.policy, self.shape = options, options.policy(), (layers, kv_heads)
        self.sources = self.policy.sources(layers)
        self.groups = sorted({source for source in self.sources if source is not None})
        self.shares = np.ones(self.shape, np.float32) if shares is None else np.ascontiguousarray(shares, np.float32)
        self.stats = np.zeros((layers, STATS_FIELDS), np.int64)
        self.min_len = options.min_len or 0

    def selection_plan(self, ctx_size: int) -> SelectionPlan:
        pages = math.ceil(max(float(self.shares.max()), 0) * self.policy.tokens(ctx_size) / PAGE)
        pages = max(pages, 1 + self.policy.recent)  # these are in every list
        return SelectionPlan(max(1, len(self.groups)), min(pages, -(-ctx_size // PAGE)) + 2, self.policy.index, self.policy.means)

    def prepare(self, sequences: int, max_pages: int) -> None:
        """Memory for the scores of one layer's pages."""
        self.scores = np.zeros((sequences, self.shape[1], max_pages), np.float32)

    def operators(self, layer: int) -> list[tuple[str, dict]]:
        """What runs before a layer's attention."""
        if layer not in self.groups:
            return []
        return [(name, about | {"group": self.groups.index(layer)}) for name, about in self.policy.operators(layer)]

    def arguments(self, layer: int) -> dict[str, int]:
        """What kernels need to reach the selection, under the names used in ARGS."""
        source = self.sources[layer]
        return {"selection.group": -1 if source is None else self.groups.index(source), "selection.shares": self.shares.ctypes.data,
                "selection.thresholds": 0 if self.thresholds is None or layer < self.policy.dense_layers else self.thresholds[layer].ctypes.data,
                "selection.stats": self.stats.ctypes.data, "selection.scores": self.scores.ctypes.data}

    def wants(self, tokens: int) -> bool:
        """Whether a decode step with so many tokens in the context is to be sparse."""
        return tokens >= self.min_len

    def figures(self) -> dict[str, float]:
        """What decode steps read since the last call: share of the pages held, over all layers; share of (layer, head) pairs that read a
        list, and of the lists that served a second step."""
        total = self.stats.sum(0)
        dense = sum(source is None for source in self.sources) / len(self.sources)
        self.stats[:] = 0
        lists = max(1, int(total[SPARSE] + total[DENSE]))
        return {"read": dense + (1 - dense) * total[READ] / max(1, int(total[HELD])), "sparse": (1 - dense) * total[SPARSE] / lists,
                "reused": total[REUSED] / lists}
