"""Walsh-Hadamard rotation of a head's channels: spreads outliers, so that a token's channels may share one scale (arXiv 2404.00456)."""
import numpy as np
from numba import njit


@njit(nogil=True, error_model="numpy")
def hadamard(x, first, depth):
    """Orthonormal, in place, of the channels x[first] ... x[first + depth]: blocks of the largest power of two that divides depth."""
    size = depth & -depth
    span = np.int64(1)
    while span < size:
        for i in range(first, first + depth, 2 * span):
            for j in range(i, i + span):
                a, b = x[j], x[j + span]
                x[j], x[j + span] = a + b, a - b
        span *= 2
    scale = np.float32(1) / np.sqrt(np.float32(size))
    for i in range(first, first + depth):
        x[i] *= scale
