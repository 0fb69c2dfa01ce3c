"""The pages with the highest scores, in the order they lie."""
import numpy as np
from numba import float32, njit

from edgeattn.kernels_cpu.floats import F, I, where_less
from edgeattn.kernels_cpu.simd import at, hsum, load, splat
from edgeattn.kernels_cpu.steps import as_f32

INFINITY = 0x7F800000  # its bits


@njit(nogil=True, error_model="numpy")
def _float(order):
    """The float that is `order` floats above 0, or below."""
    return as_f32(order if order >= 0 else 0x80000000 - order)


@njit(nogil=True, error_model="numpy")
def _below(scores, first, last, limit):
    """How many scores are less than `limit`."""
    counts, i = splat(I, np.int32(0)), first
    while i + 16 <= last:
        counts += where_less(load(F, scores, i), splat(F, limit), splat(I, np.int32(1)), splat(I, np.int32(0)))
        i += 16
    total = np.int64(hsum(counts))
    for rest in range(i, last):
        total += scores[rest] < limit
    return total


@njit(nogil=True, error_model="numpy")
def top_pages(address, first, last, wanted, pages, at_page):
    """Write the `wanted` of the pages first ... last with the highest scores (float32 at `address`, no NaN), ascending, of equals the
    lower, to pages[at_page ...]."""
    scores, most = at(float32, address), last - first - wanted
    low, high = np.int64(-INFINITY), np.int64(INFINITY) + 1  # at most `most` scores are below low
    while high - low > 1:
        middle = (low + high) >> 1
        if _below(scores, first, last, _float(middle)) <= most:
            low = middle
        else:
            high = middle
    limit, ties = _float(low), wanted - (last - first - _below(scores, first, last, _float(low + 1)))
    for page in range(first, last):
        if scores[page] > limit or (scores[page] == limit and ties > 0):
            ties -= scores[page] == limit
            pages[at_page] = page
            at_page += 1
