"""The float vector helpers: halves, exponentials, ragged ends, against NumPy."""
import numpy as np
import pytest
from numba import njit
from numba.extending import intrinsic

from edgeattn.kernels_cpu import floats
from edgeattn.kernels_cpu.floats import H, exp, exp_low, load_end, load_float, store_float, store_some
from edgeattn.kernels_cpu.simd import store
from edgeattn.kernels_cpu.steps import aligned


@intrinsic
def half_bits(typingctx, value):
    """The conversion without an instruction, whatever this machine has."""
    def codegen(context, builder, sig, args):
        return floats._half_bits(builder, args[0], H.ir)
    return H(value), codegen


@njit
def to_halves(x, out, portable):
    for i in range(0, x.size, 16):
        if portable:
            store(out, i, half_bits(load_float(x, i)))
        else:
            store_float(out, i, load_float(x, i))


@njit
def apply_exp(x, out, low):
    for i in range(0, x.size, 16):
        store(out, i, exp_low(load_float(x, i)) if low else exp(load_float(x, i)))


@njit
def copy_end(x, out, n):
    store_some(out, 0, n, load_end(x, 0, n))


@pytest.mark.parametrize("portable", [False, True])
def test_to_half_rounds_like_numpy(portable):
    """Every half, the middles between neighbours (ties), and values just beside them; overflow, subnormals, infinities."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    x = np.concatenate([halves, middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(0)),
                        np.float32([65519.9, 65520, 1e6, np.inf, 1e-8, 1e-40])]).astype(np.float32)
    x = np.concatenate([x, -x])
    x = np.concatenate([x, np.zeros(-x.size % 16, np.float32)])
    out = np.zeros(x.size, np.uint16)
    to_halves(x, out, portable)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(out, x.astype(np.float16).view(np.uint16))
    to_halves(np.full(16, np.nan, np.float32), out, portable)
    assert np.isnan(out[:16].view(np.float16)).all()


@pytest.mark.parametrize("low", [False, True])
def test_exp(low):
    x = np.linspace(-87.3, 88.7, 160_000, dtype=np.float32)
    out = aligned(x.shape, np.float32)
    apply_exp(x, out, low)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=2.5e-7 if low else 1e-6)


def test_exp_at_the_ends():
    x = np.float32([-np.inf, -1e30, -200, -87.4, 0, 1, 88.7, 89, 1e30, np.inf, np.nan, -0.0, 0, 0, 0, 0])
    out = aligned(x.shape, np.float32)
    apply_exp(x, out, False)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(out, np.exp(x), rtol=1e-6, atol=2e-38)
    apply_exp(x, out, True)
    assert (out[:4] == 0).all() and np.isnan(out[10])


@pytest.mark.parametrize("n", [0, 1, 7, 15])
def test_ragged_ends(n):
    x, out = np.arange(1, 17, dtype=np.float32), np.zeros(16, np.float32)
    copy_end(x, out, n)
    np.testing.assert_array_equal(out, np.where(np.arange(16) < n, x, 0))
    out[:] = 0
    copy_end(x.astype(np.float16).view(np.uint16), out, n)
    np.testing.assert_array_equal(out, np.where(np.arange(16) < n, x, 0))
