"""KV type delta, of keys: blocks of channels that stand until they are written again (page_formats.py), after DeltaLLM (arXiv 2507.19608).

A score is the running sum r(t) = r(t - 1) + sum over the blocks written at t of q * (new - old). It is made without rounding errors that
run on: q times a block's values is summed once, when the block is written, in lanes that are the tokens written; the lanes are then
spread over the 32 tokens. What is not written is neither read nor multiplied.
"""
import numpy as np
from numba import float32, int64, njit, uint16, uint32, uint8

from edgeattn.kernels_cpu.float_tiles import outer_add_rows
from edgeattn.kernels_cpu.floats import F, count_bits, from_half, lanes_of, to_half
from edgeattn.kernels_cpu.page_rows import GAP, HALF, HEAD_ROWS, HEADS, OUT_STRIDE, ROWS, WEIGHT_STRIDE
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, hmax, hsum, load, load_half, prefetch, splat, store, zeros

ALL = 0xFFFFFFFF


@njit(nogil=True, error_model="numpy")
def _values_at(codes, depth, size):
    """Address of the first value; `size` channels make a block."""
    return codes + (4 + 4 * (depth // size) + 63) // 64 * 64


@njit(nogil=True, error_model="numpy")
def _block(codes, b):
    """For each token the place of its value among those written, two vectors; how many were written."""
    bits = int64(at(uint32, codes)[1 + b])
    low, high, _ = count_bits(bits >> 1)
    return low, high, count_bits(bits)[2]


@njit(nogil=True, error_model="numpy")
def _products(values, count, size, weights, first, stride, ahead):
    """Sums over a block's channels of weight * value, for HEAD_ROWS query heads; lanes are the 16 tokens written from `values` on."""
    acc = zeros(F, HEAD_ROWS)
    for c in range(size):
        prefetch(at(uint8, ahead), 2 * c * count)
        acc = outer_add_rows(acc, (load_half(F, at(uint16, values), c * count),), weights, first + c, stride)
    return acc


@njit(nogil=True, error_model="numpy")
def _spread(to, first, stride, low, high, places):
    """Add to 16 tokens' scores what stands at their places."""
    store(to, first, load(F, to, first) + lanes_of(low[0], high[0], places))
    store(to, first + stride, load(F, to, first + stride) + lanes_of(low[1], high[1], places))
    store(to, first + 2 * stride, load(F, to, first + 2 * stride) + lanes_of(low[2], high[2], places))
    store(to, first + 3 * stride, load(F, to, first + 3 * stride) + lanes_of(low[3], high[3], places))


@worker
def add(task, codes, weights, out, ahead):
    """Scores [head, 32] += q * implied keys. Of `ahead` as much is prefetched as this page needs."""
    w, to, size, stride = at(float32, weights), at(float32, out), task[GAP], task[OUT_STRIDE]
    prefetch(at(uint8, ahead), 0)
    for h in range(0, task[HEADS], HEAD_ROWS):
        values = _values_at(codes, task[ROWS], size)
        for b in range(task[ROWS] // size):
            places_low, places_high, count = _block(codes, b)
            first = h * task[WEIGHT_STRIDE] + b * size
            low = _products(values, count, size, w, first, task[WEIGHT_STRIDE], ahead + values - codes)
            high = low
            if count > 16:
                high = _products(values + 32, count, size, w, first, task[WEIGHT_STRIDE], ahead + values + 32 - codes)
            _spread(to, h * stride, stride, low, high, places_low)
            _spread(to, h * stride + 16, stride, low, high, places_high)
            values += 2 * count * size


@worker
def expand(task, codes, params, out, unused):
    """Implied keys, channel by channel."""
    to, size = at(float32, out), task[GAP]
    values = _values_at(codes, task[ROWS], size)
    for b in range(task[ROWS] // size):
        places_low, places_high, count = _block(codes, b)
        for c in range(b * size, (b + 1) * size):
            low, high = load_half(F, at(uint16, values), 0), load_half(F, at(uint16, values), 16)  # what follows is never named by a place
            store(to, c * task[OUT_STRIDE], lanes_of(low, high, places_low))
            store(to, c * task[OUT_STRIDE] + task[HALF], lanes_of(low, high, places_high))
            values += 2 * count


@njit(nogil=True, error_model="numpy")
def _theta(x, depth, threshold):
    """Round keys to halves; -> Theta, a half as well."""
    total = splat(F, np.float32(0))
    for i in range(0, 32 * depth, 16):
        y = from_half(to_half(load(F, x, i)))
        store(x, i, y)
        total += y * y
    rms = np.sqrt(hsum(total) / np.float32(32 * depth))
    return hmax(from_half(to_half(splat(F, threshold * rms))))


@njit(nogil=True, error_model="numpy")
def _written(x, first, size, theta):
    """Bit t: at token t some channel of a block is further than theta from the values written last."""
    bits, last = int64(1), 0
    for t in range(1, 32):
        for i in range(first, first + 32 * size, 32):
            if abs(x[i + t] - x[i + last]) > theta:
                bits |= int64(1) << t
                last = t
                break
    return bits


@worker
def pack(task, values, params, codes, unused):
    """Keys `values` [ROWS, 32] float32, which are spoilt; params: threshold and refresh, float32."""
    depth, size, x, p = task[ROWS], task[GAP], at(float32, values), at(float32, params)
    blocks, theta, count = depth // size, _theta(x, depth, p[0]), int64(0)
    for b in range(blocks):
        bits = _written(x, 32 * b * size, size, theta)
        at(uint32, codes)[1 + b] = bits
        count += count_bits(bits)[2]
    if np.float32(32 * blocks - count) / np.float32(31 * blocks) < p[1]:
        theta = np.float32(0)
        for b in range(blocks):
            at(uint32, codes)[1 + b] = ALL
    at(float32, codes)[0] = theta
    out, place = at(uint16, _values_at(codes, depth, size)), 0
    for c in range(depth):
        bits, row, halves = int64(at(uint32, codes)[1 + c // size]), values + 128 * c, at(uint16, values + 128 * c)
        low, high = to_half(load(F, at(float32, row), 0)), to_half(load(F, at(float32, row), 16))
        store(halves, 0, low)
        store(halves, 16, high)
        for t in range(32):
            if bits >> t & 1:
                out[place] = halves[t]
                place += 1
    for i in range(place, 32 * depth):
        out[i] = 0
