"""The index of a sequence: for each logical page of a KV head a row of halves that page scores read in place of the keys.

Rows are made when they are needed, from the keys as the cache gives them back: `indexed` says how many of a head's pages have good ones.
Whatever moves tokens between pages, or pages within a list, lowers it.
    bounds   [2][head_dim]: the smallest key of each channel, and how far the largest lies above it, rounded outward (Quest, 2406.10774)
"""
from numba import float32, int32, njit, uint16

from edgeattn.kernels_cpu.attention_call import HEAD_DIM, KEYS_ROTATION, POOLS, SCRATCH, SCRATCH_SIZE, entry_of
from edgeattn.kernels_cpu.floats import F, H, from_half, half_towards
from edgeattn.kernels_cpu.hadamard import hadamard
from edgeattn.kernels_cpu.page_expand import expand_keys
from edgeattn.kernels_cpu.simd import at, convert, load, store, vmax, vmin
from edgeattn.page_formats import PAGE

TASK = 256  # bytes of scratch before its floats


@njit(nogil=True, error_model="numpy")
def keys_of(call, entry, thread):
    """A page's keys [32][head_dim] float32, without the rotation that only the cache knows, in the thread's scratch; -> their address."""
    depth, task = call[HEAD_DIM], call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]
    by_channel = task + TASK
    params = by_channel + 4 * PAGE * depth
    to = (params + 8 * depth + 63) // 64 * 64
    expand_keys(call[POOLS], depth, task, entry, by_channel, PAGE, 16, params)
    x, keys = at(float32, by_channel), at(float32, to)
    for t in range(PAGE):
        for c in range(depth):
            keys[t * depth + c] = x[c * PAGE + t]
        if call[KEYS_ROTATION]:  # its own inverse
            hadamard(keys, t * depth, depth)
    return to


@njit(nogil=True, error_model="numpy")
def _bounds(keys, depth, row):
    for c in range(0, depth, 16):
        low = high = load(F, keys, c)
        for t in range(1, PAGE):
            x = load(F, keys, t * depth + c)
            low, high = vmin(low, x), vmax(high, x)
        bits = convert(H, half_towards(low, False))
        store(row, c, bits)
        store(row, depth + c, convert(H, half_towards(high - from_half(bits), True)))


@njit(nogil=True, error_model="numpy")
def index_pages(call, sequence, head, last, rows, width, done, thread):
    """Make the missing ones of the first `last` rows, `width` halves each, at address `rows`. done: address of the head's count."""
    count = at(int32, done)
    for page in range(count[0], last):
        entry = entry_of(call, sequence, head, page)
        if entry >= 0:  # a released page is never scored
            _bounds(at(float32, keys_of(call, entry, thread)), call[HEAD_DIM], at(uint16, rows + 2 * page * width))
    count[0] = max(count[0], last)
