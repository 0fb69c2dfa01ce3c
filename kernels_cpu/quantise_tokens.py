"""Activations to integers, per token, in the order in which matmul_ternary reads them."""
import numpy as np
from numba import int8, int32, njit

from edgeattn.kernels_cpu.floats import F, load_some
from edgeattn.kernels_cpu.quantise import store_codes
from edgeattn.kernels_cpu.simd import (BIAS, SIGNED_BYTES, convert, hmax, hsum, i8, i32, load, nearest, splat, store, vabs, vmax, vmin,
                                       zeros)
from edgeattn.kernels_cpu.simd import at as pointer
from edgeattn.kernels_cpu.simd_bits import WORDS

I8, I16, B8, B16 = i32(8), i32(16), i8(8), i8(16)
EARLIER, LATER = np.array([1] * 4 + [0] * 4, np.int32), np.array([0] * 4 + [1] * 12, np.int32)
SIGNED_START = np.int32(128 if SIGNED_BYTES else 0)
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
def quantise_slice(x, at, k, size, factor, form, activation_bits, codes):
    """`size` codes, of which k from x[at] on and then zeros, in the order of K, or in that which 2-bit weights want; returns their sum.
    A size that is no multiple of 16 is rounded up, and must not be less than k then."""
    total, many = zeros(I16, 1)[0], splat(F, factor)
    for i in range(0, size, 16):
        value = load(F, x, at + i) if i + 16 <= k else load_some(F, x, at + i, max(k - i, 0))
        value = value * many
        if activation_bits == 4:
            value = vmin(vmax(value, splat(F, np.float32(-8))), splat(F, np.float32(7)))
        rounded = nearest(value)[0]
        total += rounded
        store_codes(codes, i, size, 2 if form == 2 else 8, rounded)
    return hsum(total)


@njit(nogil=True, error_model="numpy")
def trit_words(codes, size, to):
    """`size` codes as the words [step, WORDS] that trit_dots wants; returns the sum of all y. Four codes before the first are read and four
    behind the last, whatever they are."""
    total, total8 = zeros(I16, 1)[0], zeros(I8, 1)[0]
    for s in range(size // 20):
        first, last = s * 20, s * 4 * WORDS
        y = convert(I16, load(B16, codes, first)) * 3 - convert(I16, load(B16, codes, first - 4)) * load(I16, LATER, 0)
        z = convert(I8, load(B8, codes, first + 16)) * 3 * load(I8, EARLIER, 0) - convert(I8, load(B8, codes, first + 12))
        high, high8 = (y + 2) >> 2, ((z + 2) >> 2) * load(I8, EARLIER, 0)
        store(to, last, convert(B16, high))
        store(to, last + 16, convert(B8, high8))  # of which the second half is overwritten
        store(to, last + 20, convert(B16, y - (high << 2)))
        store(to, last + 36, convert(B8, z - (high8 << 2)))
        total += y
        total8 += z
    return hsum(total) + hsum(total8)


@njit(nogil=True, error_model="numpy")
def quantise_token(x, at, k, padded, depth, form, activation_bits, codes, scales, starts, tile, together, group, groups, row, scratch,
                   trits):
    """The row of k floats from x[at] on into row `row` of tile `group`: `tile` rows, interleaved by `together` steps of 4 bytes.

    K, padded, lies in slices of `depth`, a slice after all groups of the one before: codes int32 [slice, group, step, row]. Per [slice,
    group, row]: scales, the inverse of the factor; starts = BIAS - zero * sum(codes), where accumulators start. With `trits` a slice is the
    words of trit_dots instead, and starts is what trit_totals wants. Arrays are pointers; scratch is the address of 64 bytes, a slice of
    codes, 64 bytes, and the words of a slice.
    """
    factor = factor_of(x, at, k, activation_bits)
    place = scratch + 64
    for first in range(0, padded, depth):
        size = min(depth, padded - first)
        total = quantise_slice(x, at + first, k - first, size, factor, form, activation_bits, pointer(int8, place))
        words, count, start = pointer(int32, place), size // 4, BIAS - np.int32(1 if form == 1 else 2) * total
        if trits:
            behind = place + size + 64
            sum_y = trit_words(pointer(int8, place), size, pointer(int8, behind))
            words, count, start = pointer(int32, behind), size // 20 * WORDS, SIGNED_START * sum_y - np.int32(256) * total
        to = first // 4 * tile * groups + group * tile * count
        for s in range(count):
            codes[to + (s - s % together) * tile + row * together + s % together] = words[s]
        to = (first // depth * groups + group) * tile + row
        scales[to] = np.float32(1) / factor
        starts[to] = start


@njit(nogil=True, error_model="numpy")
def clear_token(padded, depth, scales, tile, group, groups, row):
    """A row of a tile that no token fills: its results are not used, but must be numbers."""
    for first in range(0, padded, depth):
        scales[(first // depth * groups + group) * tile + row] = np.float32(0)
