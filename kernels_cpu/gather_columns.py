"""out[i, c] = x[i, order[c]]: activations in the order of a weight whose columns are sorted by group (GPTQ's act-order)."""
import numpy as np
from numba import cfunc, float32, int64

from edgeattn.kernels_cpu.parallel import for_rows, worker
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import STEP, aligned, call

ARGS = ("x", "x.rows", "x.stride", "order", "order.0", "out", "out.stride")
X, X_ROWS, X_STRIDE, ORDER, COLUMNS, OUT, OUT_STRIDE = range(len(ARGS))
SERIAL = 1 << 16  # fewer elements are not worth a parallel region


def gather_columns(x, order):
    out = aligned((len(x), len(order)), np.float32)
    call(step, ARGS, dict(x=x, order=order, out=out))
    return out


@worker
def gather_columns_row(a, rows, first, row, thread):
    x, order, out = at(float32, a[X]), at(int64, a[ORDER]), at(float32, a[OUT])
    source, to = row * a[X_STRIDE], row * a[OUT_STRIDE]
    for i in range(a[COLUMNS]):
        out[to + i] = x[source + order[i]]


@cfunc(STEP, cache=True)
def step(a, state):
    rows = state[a[X_ROWS]]
    for_rows(gather_columns_row(), a, rows, rows * a[COLUMNS] > SERIAL)
