"""out = x + y, row by row."""
import numpy as np
from numba import cfunc, float32

from edgeattn.kernels_cpu.floats import F, load_some, store_some
from edgeattn.kernels_cpu.parallel import for_rows, worker
from edgeattn.kernels_cpu.simd import at, load, store
from edgeattn.kernels_cpu.steps import STEP, aligned, call

ARGS = ("x", "x.rows", "x.stride", "y", "y.stride", "out", "out.stride", "x.width")
X, X_ROWS, X_STRIDE, Y, Y_STRIDE, OUT, OUT_STRIDE, WIDTH = range(len(ARGS))
SERIAL = 1 << 16  # fewer elements are not worth a parallel region


def add(x, y):
    out = aligned(x.shape, np.float32)
    call(step, ARGS, dict(x=x, y=y, out=out))
    return out


@worker
def add_row(a, rows, first, row, thread):
    x, y, out, width = at(float32, a[X]), at(float32, a[Y]), at(float32, a[OUT]), a[WIDTH]
    x_at, y_at, to, whole = row * a[X_STRIDE], row * a[Y_STRIDE], row * a[OUT_STRIDE], width // 16 * 16
    for i in range(0, whole, 16):
        store(out, to + i, load(F, x, x_at + i) + load(F, y, y_at + i))
    if whole < width:
        rest = width - whole
        store_some(out, to + whole, rest, load_some(F, x, x_at + whole, rest) + load_some(F, y, y_at + whole, rest))


@cfunc(STEP, cache=True)
def step(a, state):
    rows = state[a[X_ROWS]]
    for_rows(add_row(), a, rows, rows * a[WIDTH] > SERIAL)
