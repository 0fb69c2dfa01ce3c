"""What every KV type does with the rows of a page (layouts: page_formats.py): weigh and add them, expand them, write them.

A row is 32 values, two vectors. Rows of floats are weighed by floats; quantised rows, four at a time, by signed bytes in integer dot
products, the weights' scale following. Each type's file (page_int4.py ...) makes these loops from its own way to read or write rows, as
workers; attention calls them by address, so that a new type compiles three small functions and nothing else. (The loops come from
functions that make them because Numba does not cache what takes a function as an argument.)

Arguments that stay the same over many calls stand in a small int64 array, the `task`.
"""
import numpy as np
from numba import float32, int8, uint8

from edgeattn.kernels_cpu.float_tiles import COLUMNS, add_scaled, outer_add_rows, times_16
from edgeattn.kernels_cpu.floats import F, I
from edgeattn.kernels_cpu.parallel import variant
from edgeattn.kernels_cpu.simd import (at, bitcast, convert, fma, load, load_rows, outer_dot, prefetch, splat, store,
                                       store_tile, u8, vmax, vmin, zeros)

ROWS, GAP, HEADS, WEIGHT_STRIDE, OUT_STRIDE, HALF, AHEAD_STEP, LEVELS, SCALES, COARSE, TASK_FIELDS = range(11)
HEAD_ROWS = 4  # query heads in the register tile
QUAD = u8(64)


def _type(function):
    """The type's file, by which its loops are told apart."""
    return function.py_func.__module__.rpartition(".")[2]


def add_rows_by(pair):
    @variant(_type(pair))
    def add_rows(task, values, weights, out, ahead):
        """Rows of floats: out[head, 32] += sum over rows of weights[head, row] * values[row, 32], HEAD_ROWS query heads at a time.

        GAP         elements from one row to the next
        AHEAD_STEP  bytes of `ahead` to prefetch for each row
        """
        w, to = at(float32, weights), at(float32, out)
        rows, gap, w_stride, stride, step = task[ROWS], task[GAP], task[WEIGHT_STRIDE], task[OUT_STRIDE], task[AHEAD_STEP]
        for h in range(0, task[HEADS], HEAD_ROWS):
            if COLUMNS == 2:
                acc = load_rows(F, HEAD_ROWS, 2, to, h * stride, stride, 16)
                for r in range(rows):
                    prefetch(at(uint8, ahead), r * step)
                    acc = outer_add_rows(acc, pair(values, r, gap), w, h * w_stride + r, w_stride)
                store_tile(to, h * stride, stride, 16, 2, acc)
            else:
                low = load_rows(F, HEAD_ROWS, 1, to, h * stride, stride, 16)
                for r in range(rows):
                    prefetch(at(uint8, ahead), r * step)
                    low = outer_add_rows(low, pair(values, r, gap)[:1], w, h * w_stride + r, w_stride)
                store_tile(to, h * stride, stride, 16, 1, low)
                high = load_rows(F, HEAD_ROWS, 1, to, h * stride + 16, stride, 16)
                for r in range(rows):
                    high = outer_add_rows(high, pair(values, r, gap)[1:], w, h * w_stride + r, w_stride)
                store_tile(to, h * stride + 16, stride, 16, 1, high)
    return add_rows


def dot_rows_by(quad, low_quad=None):
    """low_quad: reads the low four bits of types that have them in a plane of their own."""
    two_planes = low_quad is not None
    low_quad = low_quad or quad

    @variant(_type(quad))
    def dot_rows(task, codes, weights, out, ahead):
        """Codes: out[head, 32] += scale[head] * sum over rows of weights[head, row] * codes[row, 32].

        weights     signed bytes [HEADS / 4][quad][4 heads][4 rows]; WEIGHT_STRIDE bytes from one four of heads to the next
        SCALES      address of [HEADS] float32
        GAP         where the second plane lies, for types that have one
        COARSE      of two planes only the first is read
        AHEAD_STEP  bytes of `ahead` to prefetch for each quad
        """
        w, to, scales = at(int8, weights), at(float32, out), at(float32, task[SCALES])
        quads, gap, stride, step = task[ROWS] // 4, task[GAP], task[OUT_STRIDE], task[AHEAD_STEP]
        for h in range(0, task[HEADS], HEAD_ROWS):
            first = h // HEAD_ROWS * task[WEIGHT_STRIDE]
            if COLUMNS == 2:
                acc = zeros(I, 8)
                for g in range(quads):
                    prefetch(at(uint8, ahead), g * step)
                    acc = outer_dot(acc, quad(codes, g, gap), w, first + 16 * g)
                if two_planes:
                    acc = times_16(acc)
                    if not task[COARSE]:
                        for g in range(quads):
                            prefetch(at(uint8, ahead), g * step + 64)
                            acc = outer_dot(acc, low_quad(codes, g, gap), w, first + 16 * g)
                total = load_rows(F, HEAD_ROWS, 2, to, h * stride, stride, 16)
                store_tile(to, h * stride, stride, 16, 2, add_scaled(total, acc, scales, h))
            else:
                low = high = zeros(I, 4)
                for g in range(quads):
                    prefetch(at(uint8, ahead), g * step)
                    low = outer_dot(low, quad(codes, g, gap)[:1], w, first + 16 * g)
                for g in range(quads):
                    high = outer_dot(high, quad(codes, g, gap)[1:], w, first + 16 * g)
                if two_planes:
                    low, high = times_16(low), times_16(high)
                    if not task[COARSE]:
                        for g in range(quads):
                            prefetch(at(uint8, ahead), g * step + 64)
                            low = outer_dot(low, low_quad(codes, g, gap)[:1], w, first + 16 * g)
                        for g in range(quads):
                            high = outer_dot(high, low_quad(codes, g, gap)[1:], w, first + 16 * g)
                total = load_rows(F, HEAD_ROWS, 1, to, h * stride, stride, 16)
                store_tile(to, h * stride, stride, 16, 1, add_scaled(total, low, scales, h))
                total = load_rows(F, HEAD_ROWS, 1, to, h * stride + 16, stride, 16)
                store_tile(to, h * stride + 16, stride, 16, 1, add_scaled(total, high, scales, h))
    return dot_rows


def expand_rows_by(pair):
    @variant(_type(pair))
    def expand_rows(task, values, params, out):
        """Rows of floats to float32: the first 16 values at row * OUT_STRIDE, the others HALF further on."""
        to = at(float32, out)
        for r in range(task[ROWS]):
            a, b = pair(values, r, task[GAP])
            store(to, r * task[OUT_STRIDE], a)
            store(to, r * task[OUT_STRIDE] + task[HALF], b)
    return expand_rows


def expand_quads_by(quad):
    @variant(_type(quad))
    def expand_quads(task, codes, params, out):
        """out[row] = minimum[row] + step[row] * codes[row]; params: float32 minimum [ROWS] and step [ROWS], 0 for the bare codes."""
        to, p = at(float32, out), at(float32, params)
        for g in range(task[ROWS] // 4):
            a, b = quad(codes, g, task[GAP])
            a, b = bitcast(I, a), bitcast(I, b)
            for r in range(4 * g, 4 * g + 4):
                x, y = a >> 8 * (r & 3) & 255, b >> 8 * (r & 3) & 255
                u, v = convert(F, x), convert(F, y)
                if params:
                    low, step = splat(F, p[r]), splat(F, p[task[ROWS] + r])
                    u, v = fma(u, step, low), fma(v, step, low)
                store(to, r * task[OUT_STRIDE], u)
                store(to, r * task[OUT_STRIDE] + task[HALF], v)
    return expand_quads


def pack_quads_by(put):
    @variant(_type(put))
    def code(x, low, inverse, top):
        return convert(I, vmin(vmax((x - low) * inverse, splat(F, np.float32(0))), top))

    @variant(_type(put))
    def pack_quads(task, values, params, codes):
        """Codes of `values` [ROWS, 32] float32, to nearest even; params: minimum [ROWS] and step [ROWS] float32."""
        x, p, top = at(float32, values), at(float32, params), splat(F, np.float32(task[LEVELS]))
        for g in range(task[ROWS] // 4):
            a = b = splat(I, np.int32(0))
            for j in range(4):
                r = 4 * g + j
                low, step = p[r], p[task[ROWS] + r]
                inverse = np.float32(1) / step if step > 0 else np.float32(0)
                a = a | code(load(F, x, 32 * r), low, inverse, top) << 8 * j
                b = b | code(load(F, x, 32 * r + 16), low, inverse, top) << 8 * j
            put(codes, g, task[GAP], bitcast(QUAD, a), bitcast(QUAD, b))
    return pack_quads
