"""matmul_nbits inside larger arrays: row strides, thread counts, nothing written that is not its own."""
import numpy as np
import pytest
from numba import config, get_num_threads, set_num_threads

from edgeattn.kernels_cpu.gemv_nbits import GROUPED
from edgeattn.kernels_cpu.matmul_nbits import ARGS, matmul_nbits, step, workspace_bytes
from edgeattn.kernels_cpu.simd import BIAS, SIGNED_BYTES
from edgeattn.kernels_cpu.steps import call
from edgeattn.reference.matmul_nbits import matmul_nbits as reference
from edgeattn.reference.matmul_nbits import pack_panels, quantise_activations, unpack_panels

SHAPES = [  # tokens, N, K, bits, block size: each of the paths for 1, up to 4, up to 16 and more tokens; large enough for several threads
    (1, 1030, 544, 4, 32), (3, 1000, 544, 8, 32), (4, 520, 1100, 4, 64), (7, 1000, 544, 4, 32), (20, 300, 1100, 4, 32),
    (65, 77, 300, 8, 128), (1, 2050, 544, 2, 32), (30, 300, 1100, 2, 16), (3, 1000, 544, 3, 32), (20, 300, 1100, 3, 64)]


@pytest.fixture
def threads():
    before = get_num_threads()
    yield set_num_threads
    set_num_threads(before)


def problem(rng, n, k, bits, size):
    blocks = -(-k // size)
    weights = pack_panels(rng.integers(0, 1 << bits, (n, k), np.uint8), (rng.random((n, blocks)) + 0.5) / (1 << bits),
                          rng.integers(0, 1 << bits, (n, blocks), np.uint8), bits=bits, block_size=size)
    return weights, rng.standard_normal(n, np.float32), dict(bits=bits, block_size=size, K=k, N=n)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_and_strides(shape, count, threads):
    if count > config.NUMBA_NUM_THREADS:
        pytest.skip(f"needs {count} threads, this process has {config.NUMBA_NUM_THREADS}")
    threads(count)
    tokens, n, k, bits, size = shape
    rng = np.random.default_rng()
    weights, bias, attributes = problem(rng, n, k, bits, size)
    x, out = np.full((tokens, k + 24), np.nan, np.float32), np.full((tokens + 2, n + 37), np.nan, np.float32)
    x[:, 8:k + 8] = quantise_activations(rng.standard_normal((tokens, k), np.float32), size)
    tensors = dict(zip(("x", "codes", "scales", "zero_points", "bias", "out"),
                       (x[:, 8:k + 8], weights[0], weights[1].view(np.uint16), weights[2], bias, out[1:-1, 5:n + 5])))
    call(step, ARGS, tensors, attributes, workspace_bytes=workspace_bytes)
    expected = reference(x[:, 8:k + 8], *weights, bias, **attributes)
    np.testing.assert_allclose(out[1:-1, 5:n + 5], expected, rtol=0, atol=2e-6 * k ** 0.5)
    out[1:-1, 5:n + 5] = np.nan
    assert np.isnan(out).all()


@pytest.mark.parametrize("bits, size", [(2, 16), (3, 32), (4, 32), (8, 64)])
def test_a_row_is_the_same_however_many_go_along(bits, size):
    """Bit for bit as alone up to GROUPED rows, in groups whole or not; from then on to rounding."""
    rng = np.random.default_rng()
    n, k = int(rng.integers(1, 400)), int(rng.integers(1, 700))
    weights, bias, attributes = problem(rng, n, k, bits, size)
    x = quantise_activations(rng.standard_normal((GROUPED + 1, k), np.float32), size)
    alone = np.concatenate([matmul_nbits(row[None], *weights, bias, **attributes) for row in x])
    np.testing.assert_allclose(alone, reference(x, *weights, bias, **attributes), rtol=0, atol=2e-6 * k ** 0.5)
    for rows in range(1, GROUPED + 1):
        np.testing.assert_array_equal(matmul_nbits(x[:rows], *weights, bias, **attributes), alone[:rows])
    np.testing.assert_allclose(matmul_nbits(x, *weights, bias, **attributes), alone, rtol=0, atol=2e-6 * k ** 0.5)


def test_rounds_activations_like_the_reference():
    rng = np.random.default_rng()
    weights, bias, attributes = problem(rng, 64, 512, 4, 32)
    x = rng.standard_normal((9, 512), np.float32) * rng.lognormal(size=(9, 1)).astype(np.float32)
    x[0] = 0
    expected = reference(quantise_activations(x, 32), *weights, bias, **attributes)
    np.testing.assert_allclose(matmul_nbits(x, *weights, bias, **attributes), expected, rtol=0, atol=5e-5 * np.abs(x).max())


@pytest.mark.parametrize("bits, size", [(2, 16), (2, 64), (3, 32), (3, 128), (4, 32), (8, 16)])
@pytest.mark.parametrize("zeros", [None, "whole", "half"])
def test_panels_hold_the_codes(bits, size, zeros):
    """Each code comes back as itself, times a scale of its block, less its zero point."""
    rng, n, k = np.random.default_rng(), 37, 300
    blocks = -(-k // size)
    q, scales = rng.integers(0, 1 << bits, (n, k), np.uint8), rng.random((n, blocks)).astype(np.float16)
    points = {None: None, "whole": rng.integers(0, 1 << bits, (n, blocks), np.uint8),
              "half": rng.random((n, blocks)).astype(np.float16)}[zeros]
    panels = pack_panels(q, scales, points, bits=bits, block_size=size)
    assert panels[0].shape == (-(-n // 16), blocks, size * bits // 32, 16, 4) and panels[0].dtype == np.uint8
    zero = np.full((n, blocks), 1 << (bits - 1)) if points is None else points
    expected = (q - np.repeat(zero, size, 1)[:, :k].astype(np.float32)) * np.repeat(scales, size, 1)[:, :k].astype(np.float32)
    np.testing.assert_array_equal(unpack_panels(*panels, bits=bits, block_size=size, K=k, N=n), expected)


@pytest.mark.parametrize("bits, size, said", [(5, 32, "2, 3, 4 or 8 bits, got 5"), (3, 16, "blocks of 32 or more, got 16")])
def test_formats_that_do_not_exist(bits, size, said):
    with pytest.raises(ValueError, match=said):
        pack_panels(np.zeros((16, 64), np.uint8), np.ones((16, 64 // size)), bits=bits, block_size=size)


def test_the_largest_sums_fit():
    """256 products of 127 and the code furthest from zero: the dot product must stay below 2**22 of BIAS."""
    assert BIAS == 0x4B400000 and isinstance(SIGNED_BYTES, bool)
    for code in (0, 255):
        codes, scales, _ = pack_panels(np.full((16, 256), code, np.uint8), np.ones((16, 1)), bits=8, block_size=256)
        x = np.ones((7, 256), np.float32) * np.array([[1], [-1], [1], [-1], [1], [-1], [1]], np.float32)
        got = matmul_nbits(x, codes, scales, bits=8, block_size=256, K=256, N=16)
        np.testing.assert_allclose(got, x @ np.full((256, 16), code - 128, np.float32), rtol=1e-6)
