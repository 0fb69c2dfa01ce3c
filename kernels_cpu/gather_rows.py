"""out[i] = x[indices[i]], row by row, as float32."""
import numpy as np
from numba import cfunc, njit, prange

from edgeattn.kernels_cpu.floats import load_end, load_float, store_some
from edgeattn.kernels_cpu.simd import store
from edgeattn.kernels_cpu.steps import STEP, aligned, call, f32_at, i64_at, u16_at

ARGS = ("x", "x.stride", "x.width", "indices", "indices.rows", "out", "out.stride", "x.type")
SERIAL = 1 << 16  # fewer elements are not worth a parallel region


def gather_rows(x, indices):
    out = aligned((len(indices), x.shape[1]), np.float32)
    call(step, ARGS, dict(x=x, indices=indices, out=out))
    return out


@njit(nogil=True, error_model="numpy")
def _copy(x, at, width, out, to):
    whole = width // 16 * 16
    for i in range(0, whole, 16):
        store(out, to + i, load_float(x, at + i))
    if whole < width:
        store_some(out, to + whole, width - whole, load_end(x, at + whole, width - whole))


@njit(parallel=True, nogil=True, error_model="numpy")
def _parallel(x, x_stride, width, indices, out, out_stride):
    for i in prange(indices.size):
        _copy(x, indices[i] * x_stride, width, out, i * out_stride)


@njit(nogil=True, error_model="numpy")
def gather(x, x_stride, width, indices, out, out_stride):
    """Rows of x, float32 or halves as uint16; the rows need not be contiguous."""
    if indices.size * width > SERIAL and indices.size > 1:
        _parallel(x, x_stride, width, indices, out, out_stride)
    else:
        for i in range(indices.size):
            _copy(x, indices[i] * x_stride, width, out, i * out_stride)


@cfunc(STEP, cache=True)
def step(a, state):
    x_stride, width, rows, out_stride = a[1], a[2], state[a[4]], a[6]
    indices, out = i64_at(a[3], rows), f32_at(a[5], rows * out_stride)
    if a[7]:
        gather(u16_at(a[0], x_stride), x_stride, width, indices, out, out_stride)
    else:
        gather(f32_at(a[0], x_stride), x_stride, width, indices, out, out_stride)
