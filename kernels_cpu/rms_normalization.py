"""Root-mean-square normalisation of every row, or of every group of a row (a head, for QK norm)."""
import numpy as np
from numba import cfunc, njit, prange

from edgeattn.kernels_cpu.floats import F, load_some, store_some
from edgeattn.kernels_cpu.simd import fma, hsum, load, splat, store, zeros
from edgeattn.kernels_cpu.steps import STEP, aligned, as_f32, call, f32_at

ARGS = ("x", "x.rows", "x.stride", "x.groups", "x.width", "weight", "out", "out.stride", "epsilon")
SERIAL = 1 << 15  # fewer elements are not worth a parallel region


def rms_normalization(x, weight, *, epsilon):
    out = aligned(x.shape, np.float32)
    call(step, ARGS, dict(x=x, weight=weight, out=out), dict(epsilon=epsilon))
    return out


@njit(nogil=True, error_model="numpy")
def _normalize(x, at, width, weight, out, to, epsilon):
    a, b, c, d = zeros(F, 4)
    for i in range(0, width - 63, 64):
        p, q, r, s = load(F, x, at + i), load(F, x, at + i + 16), load(F, x, at + i + 32), load(F, x, at + i + 48)
        a, b, c, d = fma(p, p, a), fma(q, q, b), fma(r, r, c), fma(s, s, d)
    whole = width // 16 * 16
    for i in range(width // 64 * 64, whole, 16):
        p = load(F, x, at + i)
        a = fma(p, p, a)
    tail = load_some(F, x, at + whole, width - whole)
    total = hsum((a + b) + (c + fma(tail, tail, d)))
    factor = splat(F, np.float32(1) / np.sqrt(total / np.float32(width) + epsilon))
    for i in range(0, whole, 16):
        store(out, to + i, load(F, x, at + i) * factor * load(F, weight, i))
    if whole < width:
        store_some(out, to + whole, width - whole, tail * factor * load_some(F, weight, whole, width - whole))


@njit(nogil=True, error_model="numpy")
def _row(x, x_stride, groups, width, weight, out, out_stride, epsilon, row):
    for g in range(groups):
        _normalize(x, row * x_stride + g * width, width, weight, out, row * out_stride + g * width, epsilon)


@njit(parallel=True, nogil=True, error_model="numpy")
def _parallel(x, x_stride, groups, width, weight, out, out_stride, epsilon, rows):
    for row in prange(rows):
        _row(x, x_stride, groups, width, weight, out, out_stride, epsilon, row)


@cfunc(STEP, cache=True)
def step(a, state):
    rows, x_stride, groups, width, out_stride, epsilon = state[a[1]], a[2], a[3], a[4], a[7], as_f32(a[8])
    x, weight, out = f32_at(a[0], rows * x_stride), f32_at(a[5], width), f32_at(a[6], rows * out_stride)
    if rows * groups * width > SERIAL and rows > 1:
        _parallel(x, x_stride, groups, width, weight, out, out_stride, epsilon, rows)
    else:
        for row in range(rows):
            _row(x, x_stride, groups, width, weight, out, out_stride, epsilon, row)
