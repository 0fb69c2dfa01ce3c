"""Queries and keys as signed bytes for estimated scores: one step for each token, as many levels to either side as are asked for.

head_dim is at most 256: sums of as many products of bytes are exact floats (simd.outer_fma).
"""
import numpy as np
from numba import int8, int32, njit

from edgeattn.kernels_cpu.float_tiles import COLUMNS
from edgeattn.kernels_cpu.floats import F, I, divide
from edgeattn.kernels_cpu.simd import BIAS, SIGNED_BYTES, at, convert, hmax, hsum, i8, load, nearest, splat, store, vabs, vmax, zeros
from edgeattn.page_formats import PAGE

B = i8(16)
MIDDLE = np.int32(0 if SIGNED_BYTES else 128)  # what is added to keys' codes, so that they are what dot8 takes
TINY = np.float32(1e-30)
BLOCK = 16 * COLUMNS


@njit(nogil=True, error_model="numpy")
def round_query(q, source, mean, first, factor, depth, levels, codes, words, to, gap):
    """(q - mean) * factor as codes, four to a word, `gap` words apart from words[to] on -> (step, what sums of products start at).
    codes: scratch, int8 [depth] and the same memory as int32."""
    top, total = splat(F, TINY), zeros(I, 1)[0]
    for c in range(0, depth, 16):
        top = vmax(top, vabs((load(F, q, source + c) - load(F, mean, first + c)) * factor))
    most = hmax(top)
    inverse = levels / most
    for c in range(0, depth, 16):
        code = nearest((load(F, q, source + c) - load(F, mean, first + c)) * factor * inverse)[0]
        total += code
        store(at(int8, codes), c, convert(B, code))
    for s in range(depth // 4):
        words[to + s * gap] = at(int32, codes)[s]
    return most / levels, BIAS - MIDDLE * hsum(total)


@njit(nogil=True, error_model="numpy")
def round_page(page, mean, first, depth, levels, words, to, gap, steps, steps_to):
    """A page's keys, float32 [depth][32], lose the mean where they lie. Their codes, four channels to a word, go to words[to] and on,
    quads of channels `gap` words apart: 32 tokens each, or, where the gap is 16, all quads of the first 16 tokens and then those of the
    others."""
    for half in range(0, PAGE, 16):
        top = splat(F, TINY)
        for c in range(depth):
            x = load(F, page, c * PAGE + half) - splat(F, mean[first + c])
            store(page, c * PAGE + half, x)
            top = vmax(top, vabs(x))
        behind = half if gap == PAGE else half // 16 * depth // 4 * gap
        store(steps, steps_to + half, top / splat(F, levels))
        inverse = divide(splat(F, levels), top)
        for s in range(depth // 4):
            word = zeros(I, 1)[0]
            for j in range(4):
                code = nearest(load(F, page, (4 * s + j) * PAGE + half) * inverse)[0] + MIDDLE
                word = word | (code & 255) << 8 * j
            store(words, to + behind + s * gap, word)


@njit(nogil=True, error_model="numpy")
def address(place, bytes_):
    """Where the next thing begins, on a 64-byte boundary, behind one of so many bytes."""
    return (place + bytes_ + 63) // 64 * 64
