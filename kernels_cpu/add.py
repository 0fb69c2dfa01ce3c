"""out = x + y, row by row."""
import numpy as np
from numba import cfunc, njit, prange

from edgeattn.kernels_cpu.floats import F, load_some, store_some
from edgeattn.kernels_cpu.simd import load, store
from edgeattn.kernels_cpu.steps import STEP, aligned, call, f32_at

ARGS = ("x", "x.rows", "x.stride", "y", "y.stride", "out", "out.stride", "x.width")
SERIAL = 1 << 16  # fewer elements are not worth a parallel region


def add(x, y):
    out = aligned(x.shape, np.float32)
    call(step, ARGS, dict(x=x, y=y, out=out))
    return out


@njit(nogil=True, error_model="numpy")
def _row(x, at, y, y_at, out, to, width):
    whole = width // 16 * 16
    for i in range(0, whole, 16):
        store(out, to + i, load(F, x, at + i) + load(F, y, y_at + i))
    if whole < width:
        rest = width - whole
        store_some(out, to + whole, rest, load_some(F, x, at + whole, rest) + load_some(F, y, y_at + whole, rest))


@njit(parallel=True, nogil=True, error_model="numpy")
def _parallel(x, x_stride, y, y_stride, out, out_stride, rows, width):
    for r in prange(rows):
        _row(x, r * x_stride, y, r * y_stride, out, r * out_stride, width)


@cfunc(STEP, cache=True)
def step(a, state):
    rows, x_stride, y_stride, out_stride, width = state[a[1]], a[2], a[4], a[6], a[7]
    x, y, out = f32_at(a[0], rows * x_stride), f32_at(a[3], rows * y_stride), f32_at(a[5], rows * out_stride)
    if rows * width > SERIAL and rows > 1:
        _parallel(x, x_stride, y, y_stride, out, out_stride, rows, width)
    else:
        for r in range(rows):
            _row(x, r * x_stride, y, r * y_stride, out, r * out_stride, width)
