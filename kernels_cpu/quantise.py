"""Activations to int8, per token and block of K, in the order in which matmul_nbits reads them."""
import numpy as np
from numba import njit

from edgeattn.kernels_cpu.simd import (BIAS, SIGNED_BYTES, convert, evens_odds, f32, hmax, hsum, i8, i32, load, nearest, splat, store, vabs,
                                       vmax, zeros)

F16, I16, B4, B8, B16 = f32(16), i32(16), i8(4), i8(8), i8(16)
MAX_BLOCK = 256
ZERO8 = 0 if SIGNED_BYTES else 128  # what 8-bit codes, as the dot products see them, are too large by


@njit(nogil=True, error_model="numpy")
def store_codes(codes, i, size, bits, rounded):
    """16 codes of k = i ... of a block of `size`. A byte of weights holds neighbours of K, two of 4 bits, four of 2 (and 3): the lowest
    bits of a register meet every second or fourth k. So first come the codes of those, then of the next ones."""
    if bits == 8:
        store(codes, i, convert(B16, rounded))
        return
    even, odd = evens_odds(rounded)
    if bits == 4:
        store(codes, i // 2, convert(B8, even))
        store(codes, (size + i) // 2, convert(B8, odd))
        return
    (first, third), (second, fourth) = evens_odds(even), evens_odds(odd)
    store(codes, i // 4, convert(B4, first))
    store(codes, (size + i) // 4, convert(B4, second))
    store(codes, (2 * size + i) // 4, convert(B4, third))
    store(codes, (3 * size + i) // 4, convert(B4, fourth))


@njit(nogil=True, error_model="numpy")
def quantise_block(x, at, size, bits, codes):
    """`size` floats from x[at] on to int8 codes, in the order that weights of `bits` want (store_codes). Returns scale, sum of codes.

    The arithmetic is the reference's, division included, so that both round alike.
    """
    top = vabs(load(F16, x, at))
    for i in range(16, size, 16):
        top = vmax(top, vabs(load(F16, x, at + i)))
    scale = max(hmax(top), np.float32(1e-20)) / np.float32(127)
    divisor, total = splat(F16, scale), zeros(I16, 1)[0]
    for i in range(0, size, 16):
        rounded = nearest(load(F16, x, at + i) / divisor)[0]
        total += rounded
        store_codes(codes, i, size, bits, rounded)
    return scale, hsum(total)


@njit(nogil=True, error_model="numpy")
def quantise_row(x, at, k, size, bits, codes, scales, starts, sums, tile, together, group, groups, row, depth, floats, bytes_, words):
    """The row of k floats from x[at] on into row `row` of tile `group`: `tile` rows, interleaved by `together` steps of 4 bytes.

    K lies in slices of `depth` blocks, a slice after all groups of the one before: codes int32 [slice, group, block, step, row].
    Per [slice, group, block, row]: scales; starts = BIAS - zero * sum(codes), where accumulators start; sums = -scale * sum.
    Arrays are pointers; floats (256 float32) and bytes_ (256 int8, the same as int32 words) are scratch.
    """
    blocks, steps = (k + size - 1) // size, size // 4
    zero = ZERO8 if bits == 8 else 1 << (bits - 1)
    for b in range(blocks):
        source, first = x, at + b * size
        if b * size + size > k:  # the last block is shorter: pad with zeros
            rest = k - b * size
            for i in range(size):
                floats[i] = x[first + i] if i < rest else np.float32(0)
            source, first = floats, 0
        scale, total = quantise_block(source, first, size, bits, bytes_)
        slice_ = b // depth * depth
        to = slice_ * groups + group * min(depth, blocks - slice_) + b - slice_
        for s in range(steps):
            codes[(to * steps + s - s % together) * tile + row * together + s % together] = words[s]
        to = to * tile + row
        scales[to] = scale
        starts[to] = BIAS - np.int32(zero) * total
        sums[to] = -scale * np.float32(total)


@njit(nogil=True, error_model="numpy")
def clear_row(k, size, scales, sums, tile, group, groups, row, depth):
    """A row of a tile that no token fills: whatever its codes are, its results are zero (they are not used)."""
    blocks = (k + size - 1) // size
    for b in range(blocks):
        slice_ = b // depth * depth
        to = (slice_ * groups + group * min(depth, blocks - slice_) + b - slice_) * tile + row
        scales[to] = sums[to] = np.float32(0)
