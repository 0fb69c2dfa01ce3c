"""Root-mean-square normalisation of every row, or of every group of a row (a head, for QK norm)."""
import numpy as np
from numba import cfunc, float32, njit

from edgeattn.kernels_cpu.floats import F, load_some, store_some
from edgeattn.kernels_cpu.parallel import for_rows, worker
from edgeattn.kernels_cpu.simd import at, fma, hsum, load, splat, store, zeros
from edgeattn.kernels_cpu.steps import STEP, aligned, as_f32, call

ARGS = ("x", "x.rows", "x.stride", "x.groups", "x.width", "weight", "out", "out.stride", "epsilon")
X, X_ROWS, X_STRIDE, GROUPS, WIDTH, WEIGHT, OUT, OUT_STRIDE, EPSILON = range(len(ARGS))
SERIAL = 1 << 15  # fewer elements are not worth a parallel region


def rms_normalization(x, weight, *, epsilon):
    out = aligned(x.shape, np.float32)
    call(step, ARGS, dict(x=x, weight=weight, out=out), dict(epsilon=epsilon))
    return out


@njit(nogil=True, error_model="numpy")
def _normalize(x, start, width, weight, out, to, epsilon):
    a, b, c, d = zeros(F, 4)
    for i in range(0, width - 63, 64):
        p, q, r, s = load(F, x, start + i), load(F, x, start + i + 16), load(F, x, start + i + 32), load(F, x, start + i + 48)
        a, b, c, d = fma(p, p, a), fma(q, q, b), fma(r, r, c), fma(s, s, d)
    whole = width // 16 * 16
    for i in range(width // 64 * 64, whole, 16):
        p = load(F, x, start + i)
        a = fma(p, p, a)
    tail = load_some(F, x, start + whole, width - whole)
    total = hsum((a + b) + (c + fma(tail, tail, d)))
    factor = splat(F, np.float32(1) / np.sqrt(total / np.float32(width) + epsilon))
    for i in range(0, whole, 16):
        store(out, to + i, load(F, x, start + i) * factor * load(F, weight, i))
    if whole < width:
        store_some(out, to + whole, width - whole, tail * factor * load_some(F, weight, whole, width - whole))


@worker
def normalize_row(a, rows, first, row, thread):
    x, weight, out, width = at(float32, a[X]), at(float32, a[WEIGHT]), at(float32, a[OUT]), a[WIDTH]
    for g in range(a[GROUPS]):
        _normalize(x, row * a[X_STRIDE] + g * width, width, weight, out, row * a[OUT_STRIDE] + g * width, as_f32(a[EPSILON]))


@cfunc(STEP, cache=True)
def step(a, state):
    rows = state[a[X_ROWS]]
    for_rows(normalize_row(), a, rows, rows * a[GROUPS] * a[WIDTH] > SERIAL)
