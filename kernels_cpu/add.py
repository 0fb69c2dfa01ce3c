"""out = x + y, row by row."""
from numba import cfunc, njit

from edgeattn.kernels_cpu.steps import STEP, aligned, call, f32_at

ARGS = ("x", "x.rows", "x.stride", "y", "y.stride", "out", "out.stride", "x.width")


def add(x, y):
    out = aligned(x.shape, x.dtype)
    call(step, ARGS, dict(x=x, y=y, out=out))
    return out


@njit(nogil=True, error_model="numpy")
def _add(x, x_stride, y, y_stride, out, out_stride, rows, width):
    for r in range(rows):
        for i in range(width):
            out[r * out_stride + i] = x[r * x_stride + i] + y[r * y_stride + i]


@cfunc(STEP, cache=True)
def step(a, state):
    rows, width = state[a[1]], a[7]
    _add(f32_at(a[0], rows * a[2]), a[2], f32_at(a[3], rows * a[4]), a[4], f32_at(a[5], rows * a[6]), a[6], rows, width)
