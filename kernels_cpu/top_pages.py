"""The pages with the highest scores, in the order they lie."""
import numpy as np
from numba import int32, njit

from edgeattn.kernels_cpu.simd import at


@njit(nogil=True, error_model="numpy")
def _order(bits):
    """Bits of a float as an int that compares as the float does; -0 as 0."""
    return bits if bits >= 0 else (np.int64(0) if bits == -2147483648 else -(bits & 0x7FFFFFFF))


@njit(nogil=True, error_model="numpy")
def _at_least(scores, first, last, limit):
    count = np.int64(0)
    for i in range(first, last):
        count += _order(np.int64(scores[i])) >= limit
    return count


@njit(nogil=True, error_model="numpy")
def top_pages(address, first, last, wanted, pages, at_page):
    """Write the `wanted` of the pages first ... last with the highest scores (float32 at `address`, no NaN), ascending, of equals the
    lower, to pages[at_page ...]."""
    scores = at(int32, address)
    low, high = np.int64(-0x7F800000), np.int64(0x7F800000) + 1  # at least `wanted` reach low, fewer reach high
    while high - low > 1:
        middle = (low + high) >> 1
        if _at_least(scores, first, last, middle) >= wanted:
            low = middle
        else:
            high = middle
    ties = wanted - _at_least(scores, first, last, high)
    for page in range(first, last):
        x = _order(np.int64(scores[page]))
        if x >= high or (x == low and ties > 0):
            ties -= x == low
            pages[at_page] = page
            at_page += 1
