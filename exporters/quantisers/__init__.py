"""Weights to codes: one method a file, named as `--quantiser` is.

Each has
    quantise(weight, bits, block_size, statistics)
        weight      [n, K]  float32
        statistics  of the matrix's input on calibration text, or None where the method's NEEDS_STATISTICS is False
        ->  codes        [n, blocks * block_size]  uint8, 0 ... 2**bits - 1; K is padded with the block's code of zero
            scales       [n, blocks]               float16
            zero_points  [n, blocks]               uint8 or float16, or None for 2**(bits - 1): w = (code - zero_point) * scale
Rows do not depend on one another: a matrix may be given in pieces.
"""
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

import numpy as np


@dataclass(frozen=True)
class Head:
    """Rows start ... stop of a matrix whose changes D [rows, K] cost tr(metric D hessian D^T)."""
    start: int
    stop: int
    metric: np.ndarray   # [rows, rows] float64
    hessian: np.ndarray  # [K, K] float32


@dataclass(frozen=True)
class Statistics:
    """What calibration text says about a matrix's input x [tokens, K]."""
    hessian: np.ndarray    # [K, K] float32, the mean of x^T x
    magnitude: np.ndarray  # [K] float32, the mean of |x|
    heads: tuple[Head, ...] = ()  # of qkv_proj, for methods that have NEEDS_HEADS


def names() -> list[str]:
    """What `--quantiser` takes."""
    return sorted(m.name for m in iter_modules(__path__) if hasattr(import_module(f"{__name__}.{m.name}"), "quantise"))


def load(name: str) -> ModuleType:
    """The method's module; ValueError for an unknown one."""
    if name not in names():
        raise ValueError(f"unknown quantiser {name!r}; choose one of {names()}")
    return import_module(f"{__name__}.{name}")


def dequantise(codes: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, bits: int) -> np.ndarray:
    """The weights [n, blocks * block_size] float32 that codes stand for."""
    zero = np.float32(1 << (bits - 1)) if zero_points is None else zero_points.astype(np.float32)[..., None]
    blocks = codes.reshape(*scales.shape, -1).astype(np.float32)
    return ((blocks - zero) * scales.astype(np.float32)[..., None]).reshape(codes.shape)
