"""Products that take in the steps around them: which ones do, and that they write what each step writes by itself."""
import numpy as np
import pytest
from cuda_device import needs_cuda

from edgeattn.arguments import TYPES
from edgeattn.backend_cuda import Step
from edgeattn.kernels_cuda import add, fused_steps, gated_activation, gather_columns, matmul_nbits, rms_normalization, steps
from edgeattn.verification.cases import quantised

EPSILON = int(np.float32(1e-5).view(np.int32))


def step(operator, kernel, **arguments):
    return Step(operator, operator, kernel, {"x.rows": 0, "x.stride": 0, "out.stride": 0, "state": 0} | arguments, 0)


def norm(x, weight, out, width, **more):
    return step("rms_normalization", rms_normalization,
                **{"x": x, "x.groups": 1, "x.width": width, "weight": weight, "out": out, "epsilon": EPSILON} | more)


def product(x, out, k, n, weights=(0, 0, 0), bits=4, bias=0, **more):
    names = dict(zip(("codes", "scales", "zero_points"), weights))
    return step("matmul_nbits", matmul_nbits, x=x, out=out, K=k, N=n, bits=bits, block_size=more.pop("block_size", 32), bias=bias,
                workspace=0, **{"zero_points.type": TYPES["uint8"]} | names | more)


def plus(x, y, out, width):
    return step("add", add, **{"x": x, "y": y, "y.stride": 0, "out": out, "x.width": width})


def gate(x, out, width, activation=0):
    return step("gated_activation", gated_activation, **{"x": x, "x.width": width, "out": out, "activation": activation})


def ordered(x, order, out, width):
    return step("gather_columns", gather_columns, **{"x": x, "order": order, "order.0": width, "out": out})


def operators(made):
    return [("norm " if fused_steps.BEFORE in s.arguments else "") + s.operator + (" and" if fused_steps.AFTER in s.arguments else "")
            for s in made]


def test_a_layer_has_four_products():
    """Of eight steps beside attention; with more tokens everything stays."""
    layer = [norm(1 << 10, 16, 2 << 10, 64), product(2 << 10, 3 << 10, 64, 96), step("cached_attention", None),
             product(4 << 10, 5 << 10, 64, 64), plus(1 << 10, 5 << 10, 6 << 10, 64), norm(6 << 10, 16, 7 << 10, 64),
             product(7 << 10, 8 << 10, 64, 192), gate(8 << 10, 9 << 10, 192), product(9 << 10, 10 << 10, 96, 64),
             plus(6 << 10, 10 << 10, 11 << 10, 64)]
    made = fused_steps.fuse(layer, {0: 1})
    assert operators(made) == ["norm matmul_nbits", "cached_attention", "matmul_nbits and", "norm matmul_nbits and", "matmul_nbits and"]
    assert fused_steps.fuse(layer, {0: 2}) == layer


def test_of_act_order_a_normalisation_orders_its_row():
    """Which the product behind it reads, whatever it could normalise by itself."""
    steps = [norm(1 << 10, 16, 2 << 10, 64), ordered(2 << 10, 32, 3 << 10, 64), product(2 << 10, 4 << 10, 64, 64),
             product(3 << 10, 5 << 10, 64, 64), plus(1 << 10, 5 << 10, 6 << 10, 64)]
    made = fused_steps.fuse(steps, {0: 1})
    assert operators(made) == ["rms_normalization and", "matmul_nbits", "matmul_nbits and"]
    assert fused_steps.fuse(steps, {0: 2}) == steps


@pytest.mark.parametrize("why, steps", {
    "another row": [norm(1 << 10, 16, 2 << 10, 64), product(3 << 10, 4 << 10, 64, 64)],
    "groups of a row": [norm(1 << 10, 16, 2 << 10, 64, **{"x.groups": 2, "x.width": 32}), product(2 << 10, 4 << 10, 64, 64)],
    "blocks of 16": [norm(1 << 10, 16, 2 << 10, 64), product(2 << 10, 4 << 10, 64, 64, block_size=16)],
    "too long": [norm(1 << 20, 16, 2 << 20, 16384), product(2 << 20, 4 << 20, 16384, 64)],
    "over its own row": [norm(1 << 10, 16, 2 << 10, 64), product(2 << 10, (1 << 10) + 128, 64, 64)],
    "the sum over what is read": [product(1 << 10, 2 << 10, 64, 64), plus(2 << 10, 3 << 10, (1 << 10) + 252, 64)],
    "the sum of others": [product(1 << 10, 2 << 10, 64, 64), plus(3 << 10, 4 << 10, 5 << 10, 64)],
    "twice the same": [product(1 << 10, 2 << 10, 64, 64), plus(2 << 10, 2 << 10, 5 << 10, 64)],
    "a part of the product": [product(1 << 10, 2 << 10, 64, 64), plus(2 << 10, 3 << 10, 4 << 10, 32)],
    "columns of another row": [norm(1 << 10, 16, 2 << 10, 64), ordered(3 << 10, 32, 4 << 10, 64)],
    "columns over what is normalised": [norm(1 << 10, 16, 2 << 10, 64), ordered(2 << 10, 32, (1 << 10) + 252, 64)],
    "a part of the columns": [norm(1 << 10, 16, 2 << 10, 64), ordered(2 << 10, 32, 3 << 10, 32)],
    "columns of groups": [norm(1 << 10, 16, 2 << 10, 64, **{"x.groups": 2, "x.width": 32}), ordered(2 << 10, 32, 3 << 10, 32)],
    "gates that share a panel": [product(1 << 10, 2 << 10, 64, 80), gate(2 << 10, 4 << 10, 80)],
}.items())
def test_what_stays_apart(why, steps):
    assert fused_steps.fuse(steps, {0: 1}) == steps, why


@needs_cuda
@pytest.mark.parametrize("hidden, half, bits, zeros, size", [
    (2048, 8192, 4, False, 32), (64, 48, 4, True, 32), (4096, 528, 8, False, 32), (32, 16, 8, True, 32), (3584, 1040, 4, True, 32),
    (1056, 8000, 4, False, 32), (1024, 528, 3, "half", 32), (512, 1040, 2, False, 32), (2048, 1040, 4, True, 128),
    (4000, 528, 4, False, 256), (520, 272, 8, True, 64), (64, 48, 4, True, 128), (1024, 528, 3, "half", 128)])
@pytest.mark.parametrize("activation", [0, 1])
def test_all_values_are_as_if_each_step_had_run(hidden, half, bits, zeros, size, activation):
    rng, arrays = np.random.default_rng(), steps.Arrays()
    held = {name: np.full((1, n), np.nan, np.float32) for name, n in dict(
        normal=hidden, product=hidden, sum=hidden, normal_2=hidden, wide=2 * half, gated=half, down=hidden, out=hidden).items()}
    x, gains = rng.standard_normal((1, hidden), np.float32), rng.standard_normal((2, hidden), np.float32)
    bias, state = rng.standard_normal(2 * half, np.float32), np.ones(1, np.int64)
    at = {name: arrays.address(a) for name, a in (held | {"x": x}).items()}

    kind = {"zero_points.type": TYPES["float16" if zeros == "half" else "uint8"], "block_size": size}

    def weights(n, k):
        return [arrays.address(w) if w is not None else 0 for w in (*quantised(rng, n, k, bits, size, zeros), None)[:3]]
    layer = [norm(at["x"], arrays.address(gains), at["normal"], hidden),
             product(at["normal"], at["product"], hidden, hidden, weights(hidden, hidden), bits, **kind),
             plus(at["product"], at["x"], at["sum"], hidden),
             norm(at["sum"], arrays.address(gains) + 4 * hidden, at["normal_2"], hidden),
             product(at["normal_2"], at["wide"], hidden, 2 * half, weights(2 * half, hidden), bits, arrays.address(bias), **kind),
             gate(at["wide"], at["gated"], 2 * half, activation),
             product(at["gated"], at["down"], half, hidden, weights(hidden, half), bits, **kind),
             plus(at["sum"], at["down"], at["out"], hidden)]
    for one in layer:
        one.arguments["state"] = arrays.address(state)

    def found(some):
        steps.run([launch for one in some for launch in one.kernel.launches(one.arguments, {0: 1})])
        for array in held.values():
            arrays.fetch(array)
        got = {name: array.copy() for name, array in held.items()}
        for name, array in held.items():
            array[:] = np.nan
            steps.device.cupy().cuda.runtime.memcpy(at[name], array.ctypes.data, array.nbytes, 1)
        return got
    expected, fused = found(layer), fused_steps.fuse(layer, {0: 1})
    assert len(fused) == 3
    for got in (found(fused), found(fused)):
        for name, array in expected.items():  # another order of a sum may round an activation to its other neighbour
            assert np.isfinite(array).all() and np.isfinite(got[name]).all(), name
            error = np.abs(got[name] - array).max() / np.abs(array).max()
            assert error < (1e-6 if name == "normal" else 1e-2), (name, error)


@needs_cuda
@pytest.mark.parametrize("width", [32, 256, 1000, 4096, 5003])
def test_a_row_is_normalised_and_ordered(width):
    rng, arrays, out = np.random.default_rng(), steps.Arrays(), np.full((3, width), np.nan, np.float32)
    x, weight, order = rng.standard_normal(width, np.float32), rng.standard_normal(width, np.float32), rng.integers(0, width, width)
    state, at = np.ones(1, np.int64), arrays.address(out)
    one = [norm(arrays.address(x), arrays.address(weight), at, width), ordered(at, arrays.address(order), at + 4 * width, width)]
    for each in one:
        each.arguments["state"] = arrays.address(state)
    fused, = fused_steps.fuse(one, {0: 1})
    steps.run(fused.kernel.launches(fused.arguments, {0: 1}))
    arrays.fetch(out)
    np.testing.assert_allclose(out[0], rms_normalization.rms_normalization(x[None], weight, epsilon=1e-5)[0], rtol=1e-6)
    np.testing.assert_array_equal(out[1], out[0][order])
    assert np.isnan(out[2]).all()
