"""activation(gate) * up, where each row of x is gate then up."""
import numpy as np
from numba import cfunc, njit, prange

from edgeattn.kernels_cpu.floats import F, divide, exp, load_some, store_some
from edgeattn.kernels_cpu.simd import fma, load, splat, store, vmax
from edgeattn.kernels_cpu.steps import CODES, STEP, aligned, call, f32_at

ARGS = ("x", "x.rows", "x.stride", "out", "out.stride", "out.width", "activation")
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


@njit(nogil=True, error_model="numpy")
def _row(x, at, out, to, width, activation):
    whole = width // 16 * 16
    for i in range(0, whole, 16):
        store(out, to + i, _activate(load(F, x, at + i), activation) * load(F, x, at + width + i))
    if whole < width:
        rest = width - whole
        gate, up = load_some(F, x, at + whole, rest), load_some(F, x, at + width + whole, rest)
        store_some(out, to + whole, rest, _activate(gate, activation) * up)


@njit(parallel=True, nogil=True, error_model="numpy")
def _parallel(x, x_stride, out, out_stride, rows, width, activation):
    for r in prange(rows):
        _row(x, r * x_stride, out, r * out_stride, width, activation)


@cfunc(STEP, cache=True)
def step(a, state):
    rows, x_stride, out_stride, width, activation = state[a[1]], a[2], a[4], a[5], a[6]
    x, out = f32_at(a[0], rows * x_stride), f32_at(a[3], rows * out_stride)
    if rows * width > SERIAL and rows > 1:
        _parallel(x, x_stride, out, out_stride, rows, width, activation)
    else:
        for r in range(rows):
            _row(x, r * x_stride, out, r * out_stride, width, activation)
