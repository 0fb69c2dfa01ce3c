"""out[i] = x[indices[i]], row by row, as float32."""
import numpy as np
from numba import cfunc, float32, int64, njit, uint16

from edgeattn.kernels_cpu.floats import load_end, load_float, store_some
from edgeattn.kernels_cpu.parallel import for_rows, worker
from edgeattn.kernels_cpu.simd import at, store
from edgeattn.kernels_cpu.steps import STEP, aligned, call

ARGS = ("x", "x.stride", "x.width", "indices", "indices.rows", "out", "out.stride", "x.type")
X, X_STRIDE, WIDTH, INDICES, ROWS, OUT, OUT_STRIDE, X_TYPE = range(len(ARGS))
SERIAL = 1 << 16  # fewer elements are not worth a parallel region


def gather_rows(x, indices):
    out = aligned((len(indices), x.shape[1]), np.float32)
    call(step, ARGS, dict(x=x, indices=indices, out=out))
    return out


@njit(nogil=True, error_model="numpy")
def _copy(x, start, width, out, to):
    whole = width // 16 * 16
    for i in range(0, whole, 16):
        store(out, to + i, load_float(x, start + i))
    if whole < width:
        store_some(out, to + whole, width - whole, load_end(x, start + whole, width - whole))


@worker
def gather_row(a, rows, first, row, thread):
    source, to = at(int64, a[INDICES])[row] * a[X_STRIDE], row * a[OUT_STRIDE]
    if a[X_TYPE]:
        _copy(at(uint16, a[X]), source, a[WIDTH], at(float32, a[OUT]), to)
    else:
        _copy(at(float32, a[X]), source, a[WIDTH], at(float32, a[OUT]), to)


@cfunc(STEP, cache=True)
def step(a, state):
    rows = state[a[ROWS]]
    for_rows(gather_row(), a, rows, rows * a[WIDTH] > SERIAL)
