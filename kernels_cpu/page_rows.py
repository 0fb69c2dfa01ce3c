"""What every KV type does with the rows of a page (layouts: page_formats.py): weigh and add them, expand them, write them.

A row is 32 values, two vectors. Each type's file (page_int4.py ...) makes these loops from its own way to read or write one row, as
workers; attention calls them by address, so that a new type compiles three small functions and nothing else. (The loops come from
functions that make them because Numba does not cache what takes a function as an argument.)

Arguments that stay the same over many calls stand in a small int64 array, the `task`.
"""
import numpy as np
from numba import float32, int64, njit, uint8

from edgeattn.kernels_cpu.float_tiles import COLUMNS, outer_add_rows
from edgeattn.kernels_cpu.floats import F, I, divide, where_less
from edgeattn.kernels_cpu.simd import at, convert, fma, hmax, load, load_rows, prefetch, splat, store, store_tile, vmax, vmin

ROWS, GAP, HEADS, WEIGHT_STRIDE, OUT_STRIDE, HALF, AHEAD_STEP, LEVELS, TASK_FIELDS = range(9)
HEAD_ROWS = 4  # query heads in the register tile


def add_rows_by(pair):
    @njit(nogil=True, error_model="numpy")
    def add_rows(task, codes, weights, out, ahead):
        """out[head, 32] += sum over rows of weights[head, row] * codes[row, 32], for HEADS query heads, HEAD_ROWS at a time.

        GAP         what `pair` needs to find a row: elements between rows, or where the second plane lies
        AHEAD_STEP  bytes of `ahead` to prefetch for each row
        """
        w, to = at(float32, weights), at(float32, out)
        rows, gap, w_stride, stride, step = task[ROWS], task[GAP], task[WEIGHT_STRIDE], task[OUT_STRIDE], task[AHEAD_STEP]
        for h in range(0, task[HEADS], HEAD_ROWS):
            if COLUMNS == 2:
                acc = load_rows(F, HEAD_ROWS, 2, to, h * stride, stride, 16)
                for r in range(rows):
                    prefetch(at(uint8, ahead), r * step)
                    acc = outer_add_rows(acc, pair(codes, r, gap), w, h * w_stride + r, w_stride)
                store_tile(to, h * stride, stride, 16, 2, acc)
            else:
                low = load_rows(F, HEAD_ROWS, 1, to, h * stride, stride, 16)
                for r in range(rows):
                    prefetch(at(uint8, ahead), r * step)
                    low = outer_add_rows(low, pair(codes, r, gap)[:1], w, h * w_stride + r, w_stride)
                store_tile(to, h * stride, stride, 16, 1, low)
                high = load_rows(F, HEAD_ROWS, 1, to, h * stride + 16, stride, 16)
                for r in range(rows):
                    high = outer_add_rows(high, pair(codes, r, gap)[1:], w, h * w_stride + r, w_stride)
                store_tile(to, h * stride + 16, stride, 16, 1, high)
    return add_rows


def expand_rows_by(pair):
    @njit(nogil=True, error_model="numpy")
    def expand_rows(task, codes, params, out):
        """out[row] = minimum[row] + step[row] * codes[row]: the first 16 values at row * OUT_STRIDE, the others HALF further on.

        params: float32 minimum [ROWS] and step [ROWS]; address 0 for the bare codes.
        """
        to, p = at(float32, out), at(float32, params)
        for r in range(task[ROWS]):
            a, b = pair(codes, r, task[GAP])
            if params:
                low, step = splat(F, p[r]), splat(F, p[task[ROWS] + r])
                a, b = fma(a, step, low), fma(b, step, low)
            store(to, r * task[OUT_STRIDE], a)
            store(to, r * task[OUT_STRIDE] + task[HALF], b)
    return expand_rows


def pack_rows_by(put):
    @njit(nogil=True, error_model="numpy")
    def pack_rows(task, values, params, codes):
        """Codes of `values` [ROWS, 32] float32 to nearest even; params: minimum [ROWS] and step [ROWS] float32."""
        x, p, top = at(float32, values), at(float32, params), splat(F, np.float32(task[LEVELS]))
        for r in range(task[ROWS]):
            low, step = p[r], p[task[ROWS] + r]
            inverse = np.float32(1) / step if step > 0 else np.float32(0)
            zero = splat(F, np.float32(0))
            a = vmin(vmax((load(F, x, 32 * r) - low) * inverse, zero), top)
            b = vmin(vmax((load(F, x, 32 * r + 16) - low) * inverse, zero), top)
            put(codes, r, task[GAP], convert(I, a), convert(I, b))
    return pack_rows
