"""activation(gate) * up, where each row of x is gate then up."""
import numpy as np
from numba import cfunc, float32, njit

from edgeattn.kernels_cpu.floats import F, divide, exp, load_some, store_some
from edgeattn.kernels_cpu.parallel import for_rows, worker
from edgeattn.kernels_cpu.simd import at, fma, load, splat, store, vmax
from edgeattn.kernels_cpu.steps import CODES, STEP, aligned, call

ARGS = ("x", "x.rows", "x.stride", "out", "out.stride", "out.width", "activation")
X, X_ROWS, X_STRIDE, OUT, OUT_STRIDE, WIDTH, ACTIVATION = range(len(ARGS))
SERIAL = 1 << 14  # fewer elements are not worth a parallel region
SILU, GELU_TANH = CODES["silu"], CODES["gelu_tanh"]


def gated_activation(x, *, activation):
    out = aligned((x.shape[0], x.shape[1] // 2), np.float32)
    call(step, ARGS, dict(x=x, out=out), dict(activation=activation))
    return out


@njit(nogil=True, error_model="numpy")
def _silu(x):
    return divide(x, exp(x * np.float32(-1)) + np.float32(1))


@njit(nogil=True, error_model="numpy")
def _gelu_tanh(x):
    """x * (1 + tanh(t)) / 2 = x / (1 + e^-2t)"""
    t = x * fma(x * x, splat(F, np.float32(0.044715 * np.sqrt(8 / np.pi))), splat(F, np.float32(np.sqrt(8 / np.pi))))
    return divide(x, exp(t * np.float32(-1)) + np.float32(1))


@njit(nogil=True, error_model="numpy")
def _activate(x, activation):
    if activation == SILU:
        return _silu(x)
    if activation == GELU_TANH:
        return _gelu_tanh(x)
    x = vmax(x, splat(F, np.float32(0)))
    return x * x


@worker
def activate_row(a, rows, first, row, thread):
    x, out, width, activation = at(float32, a[X]), at(float32, a[OUT]), a[WIDTH], a[ACTIVATION]
    gate, to, whole = row * a[X_STRIDE], row * a[OUT_STRIDE], width // 16 * 16
    up = gate + width
    for i in range(0, whole, 16):
        store(out, to + i, _activate(load(F, x, gate + i), activation) * load(F, x, up + i))
    if whole < width:
        rest = width - whole
        result = _activate(load_some(F, x, gate + whole, rest), activation) * load_some(F, x, up + whole, rest)
        store_some(out, to + whole, rest, result)


@cfunc(STEP, cache=True)
def step(a, state):
    rows = state[a[X_ROWS]]
    for_rows(activate_row(), a, rows, rows * a[WIDTH] > SERIAL)
