"""The online softmax that decode and prefill share (arXiv 1805.02867)."""
import numpy as np
from numba import njit

from edgeattn.kernels_cpu.floats import F, any_greater, exp_low
from edgeattn.kernels_cpu.simd import hmax, load, splat, store, vmax

LOWEST_SCORE = np.float32(-3e38)  # finite, so that the difference of two is no NaN
SLACK = np.float32(8)             # scores may exceed the row's reference by so much before it moves: weights stay below e^8


@njit(nogil=True, error_model="numpy")
def soften(scores, first, last, tops, sums, row, out, to, depth):
    """One row of scores, elements first ... last, to weights exp(score - tops[row]), which also go to the row's sums (16 lanes).

    tops[row] is near the largest score so far, LOWEST_SCORE at first. Where it moves, what was summed before is rescaled: the sums
    and the weighted values, `depth` elements of `out` from `to` on.
    """
    best = splat(F, LOWEST_SCORE)
    for i in range(first, last, 16):
        best = vmax(best, load(F, scores, i))
    if any_greater(best, splat(F, tops[row] + SLACK)):
        top = hmax(best)
        factor = exp_low(splat(F, tops[row] - top))
        tops[row] = top
        store(sums, row * 16, load(F, sums, row * 16) * factor)
        for c in range(to, to + depth, 16):
            store(out, c, load(F, out, c) * factor)
    shift, total = splat(F, tops[row]), load(F, sums, row * 16)
    for i in range(first, last, 16):
        weight = exp_low(load(F, scores, i) - shift)
        store(scores, i, weight)
        total += weight
    store(sums, row * 16, total)
