"""Policies that choose which cached tokens stay when memory is full.

A policy is a frozen dataclass of options that scores tokens and touches no memory. The cache protects sinks and the recent window,
sorts (ties go to the lower index) and applies the choice: per token where pages are 16-bit, per page (mean score) where they are sealed.
"""
from typing import Protocol

import numpy as np


class HeadView(Protocol):
    """Read-only view of KV heads of one layer that hold the same number of tokens (slots).

    layer       int                       the layer's index
    positions   [heads, slots]  int32     original position of each cached token, ascending along slots
    length      int                       tokens the sequence has seen: the newest position + 1
    mass        [heads, slots]  float32   attention received, summed over the query heads of the group; zeros where the policy needs none
    seen        [heads, slots]  float32   probe queries that could see the token, >= 0
    carry       dict                      what a policy hands on from layer to layer, the first to the last, within one eviction
    """
    layer: int
    positions: np.ndarray
    length: int
    mass: np.ndarray
    seen: np.ndarray
    carry: dict

    def kept_below(self) -> np.ndarray | None:
        """[length] bool: positions that some KV head of the layer before still holds; None for the first layer."""

    def keys(self) -> np.ndarray:
        """[heads, slots, head_dim] float32, after rotary, dequantised from the cache at each call."""

    def values(self) -> np.ndarray:
        """[heads, slots, head_dim] float32, dequantised from the cache at each call."""


class EvictionPolicy(Protocol):
    """What an eviction policy file provides.

    mass     "" when it needs no attention; "sum": attention received from all queries probed since the token came;
             "last": from the probed queries of the newest forward call alone
    probes   how many of a prefill chunk's last queries are probed, 0 without attention; decode probes its one query
    """
    mass: str
    probes: int

    def scores(self, heads: HeadView) -> np.ndarray:
        """[heads, slots] float32, finite, a new array; a token with a higher score is kept longer."""
