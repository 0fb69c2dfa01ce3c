"""Which matrix gets how many bits, when an average is asked for: one method a file, named as `--mixed` is.

Each has widths(matrices, bits) -> {initializer: width}, and NEEDS, the fields of `Matrix` that it reads beyond name, layer and size.
"""
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

WIDTHS = (2, 3, 4, 8)


@dataclass
class Matrix:
    """What a method may know of a stored matrix."""
    name: str
    layer: int
    size: int                  # weights
    divergence: float = 0.0    # KL in nats a token, when this matrix alone has 2 bits
    similarity: float = 0.0    # of its layer: mean cosine of hidden states before and after
    tail: float = 0.0          # of its layer: share of weights more than one standard deviation above the mean


def names() -> list[str]:
    """What `--mixed` takes."""
    return sorted(m.name for m in iter_modules(__path__) if hasattr(import_module(f"{__name__}.{m.name}"), "widths"))


def load(name: str) -> ModuleType:
    """The method's module; ValueError for an unknown one."""
    if name not in names():
        raise ValueError(f"unknown method {name!r} of choosing widths; choose one of {names()}")
    return import_module(f"{__name__}.{name}")


def average(matrices: list[Matrix], widths: dict[str, int]) -> float:
    """Bits of a weight."""
    return sum(widths[m.name] * m.size for m in matrices) / sum(m.size for m in matrices)


def best_first(matrices: list[Matrix], bits: float, importance: Callable[[Matrix], float]) -> dict[str, int]:
    """The wider of the two widths around the average for the most important matrices, as many as the average allows."""
    low = max(width for width in WIDTHS if width <= bits)
    high = min((width for width in WIDTHS if width > low), default=low)
    widths = dict.fromkeys((m.name for m in matrices), low)
    left = (bits - low) * sum(m.size for m in matrices)
    for matrix in sorted(matrices, key=importance, reverse=True):  # stable: a layer's matrices stay together
        if (high - low) * matrix.size <= left + 1e-6 * matrix.size:
            widths[matrix.name] = high
            left -= (high - low) * matrix.size
    return widths


def best_value(matrices: list[Matrix], bits: float, loss: Callable[[Matrix, int], float]) -> dict[str, int]:
    """From the narrowest width on, always the step that saves the most loss for a bit, as long as the average allows one."""
    widths = dict.fromkeys((m.name for m in matrices), WIDTHS[0])
    left = (bits - WIDTHS[0]) * sum(m.size for m in matrices)

    def steps():
        for m in matrices:
            now = widths[m.name]
            for wider in WIDTHS[WIDTHS.index(now) + 1:]:
                cost = (wider - now) * m.size
                if cost <= left + 1e-6 * m.size:
                    yield (loss(m, now) - loss(m, wider)) / cost, m.name, wider, cost
    while found := max(steps(), default=None):
        _, name, wider, cost = found
        widths[name], left = wider, left - cost
    return widths
