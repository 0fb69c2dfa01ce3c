"""Activations to integers, per token, in the order in which matmul_ternary reads them."""
import numpy as np
from numba import njit

from edgeattn.kernels_cpu.floats import F, load_some
from edgeattn.kernels_cpu.quantise import store_codes
from edgeattn.kernels_cpu.simd import BIAS, hmax, hsum, i32, load, nearest, splat, vabs, vmax, vmin, zeros

I16 = i32(16)
LEAST, WHOLE, ROOT7 = np.float32(1e-5), np.float32(127), np.sqrt(np.float32(7))


@njit(nogil=True, error_model="numpy")
def factor_of(x, at, k, activation_bits):
    """What a token's k floats from x[at] on are multiplied by: the reference's arithmetic, so that both round alike."""
    if activation_bits == 8:
        whole = k // 16 * 16
        top = vabs(load_some(F, x, at + whole, k - whole))
        for i in range(0, whole, 16):
            top = vmax(top, vabs(load(F, x, at + i)))
        return WHOLE / max(hmax(top), LEAST)
    total = 0.0
    for i in range(k):
        total += np.float64(abs(x[at + i]))
    return ROOT7 / max(np.float32(total / k), LEAST)


@njit(nogil=True, error_model="numpy")
def quantise_slice(x, at, k, size, factor, activation_bits, codes):
    """`size` codes, of which k from x[at] on and then zeros, in the order that 2-bit weights want; returns their sum."""
    total, many = zeros(I16, 1)[0], splat(F, factor)
    for i in range(0, size, 16):
        value = load(F, x, at + i) if i + 16 <= k else load_some(F, x, at + i, max(k - i, 0))
        value = value * many
        if activation_bits == 4:
            value = vmin(vmax(value, splat(F, np.float32(-8))), splat(F, np.float32(7)))
        rounded = nearest(value)[0]
        total += rounded
        store_codes(codes, i, size, 2, rounded)
    return hsum(total)


@njit(nogil=True, error_model="numpy")
def quantise_token(x, at, k, padded, depth, activation_bits, codes, scales, starts, tile, together, group, groups, row, bytes_, words):
    """The row of k floats from x[at] on into row `row` of tile `group`: `tile` rows, interleaved by `together` steps of 4 bytes.

    K, padded, lies in slices of `depth`, a slice after all groups of the one before: codes int32 [slice, group, step, row]. Per [slice,
    group, row]: scales, the inverse of the factor; starts = BIAS - 2 * sum(codes), where accumulators start. Arrays are pointers;
    bytes_ (the same as int32 words) is scratch for one slice.
    """
    factor = factor_of(x, at, k, activation_bits)
    for first in range(0, padded, depth):
        size = min(depth, padded - first)
        total = quantise_slice(x, at + first, k - first, size, factor, activation_bits, bytes_)
        to = first // 4 * tile * groups + group * tile * (size // 4)
        for s in range(size // 4):
            codes[to + (s - s % together) * tile + row * together + s % together] = words[s]
        to = (first // depth * groups + group) * tile + row
        scales[to] = np.float32(1) / factor
        starts[to] = BIAS - 2 * total


@njit(nogil=True, error_model="numpy")
def clear_token(padded, depth, scales, tile, group, groups, row):
    """A row of a tile that no token fills: its results are not used, but must be numbers."""
    for first in range(0, padded, depth):
        scales[(first // depth * groups + group) * tile + row] = np.float32(0)
