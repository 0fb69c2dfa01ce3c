"""Every operator's CPU kernel against its NumPy reference, on fresh random inputs."""
import numpy as np
import pytest

from edgeattn.ops import OPS, load_kernel


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


# One entry an operator: a list of (id, arguments, keywords, tolerance) builders. Cases build their inputs from a Generator.
CASES = {
    "add": [
        ("one", lambda rng: ((rng.standard_normal((1, 1), np.float32),) * 2, {}), 0),
        ("ragged", lambda rng: ((rng.standard_normal((5, 77), np.float32), rng.standard_normal((5, 77), np.float32)), {}), 0),
    ],
    "embedding": [
        ("f32", lambda rng: ((rng.integers(0, 9, 5), normal(rng, 9, 77)), {}), 0),
        ("f16-many", lambda rng: ((rng.integers(0, 50, 300), normal(rng, 50, 576).astype(np.float16)), {}), 0),
    ],
    "gather_rows": [
        ("one", lambda rng: ((normal(rng, 3, 1), np.array([2])), {}), 0),
        ("ragged", lambda rng: ((normal(rng, 9, 77), rng.integers(0, 9, 5)), {}), 0),
    ],
    "rms_normalization": [  # values up to 4 or so, where float32 steps are 2.4e-7 to 4.8e-7
        ("one", lambda rng: ((normal(rng, 1, 1), normal(rng, 1)), dict(epsilon=1e-6)), 1e-6),
        ("ragged", lambda rng: ((normal(rng, 5, 77), normal(rng, 77)), dict(epsilon=1e-5)), 2e-6),
        ("heads", lambda rng: ((normal(rng, 200, 9, 64), normal(rng, 64)), dict(epsilon=1e-5)), 4e-6),
    ],
    "linear": [  # float32 sums of K products: a few 1e-7 of sqrt(K), the size of the outputs
        (f"{tokens}x{k}x{n}-{np.dtype(dtype).name}", lambda rng, t=tokens, k=k, n=n, d=dtype: (
            (normal(rng, t, k), normal(rng, n, k).astype(d), normal(rng, n) if n % 2 else None), {}), 4e-6 * k ** 0.5)
        for tokens, k, n in ((1, 1, 1), (1, 77, 67), (3, 100, 67), (4, 2048, 66), (5, 77, 5), (30, 515, 65), (100, 576, 576))
        for dtype in (np.float32, np.float16)],
    "gated_activation": [(activation, lambda rng, a=activation: ((normal(rng, 70, 2 * 301) * 5,), dict(activation=a)), tolerance)
                         for activation, tolerance in (("silu", 5e-5), ("gelu_tanh", 5e-5), ("relu2", 5e-4))],  # values up to 400; 8,000
    "select_sink_window": [
        ("lengths", lambda rng: ((rng.integers(1, 700, 9, np.int32),), dict(
            kv_heads=2, page_size=32, capacity=8, sink_pages=1, window_pages=3)), 0),
        ("no-sink", lambda rng: ((np.arange(1, 130, 7, dtype=np.int32),), dict(
            kv_heads=1, page_size=16, capacity=2, sink_pages=0, window_pages=2)), 0),
    ],
}


@pytest.mark.parametrize("name, case", [pytest.param(n, c, id=f"{n}-{c[0]}") for n, cases in CASES.items() for c in cases])
def test_kernel_matches_reference(name, case):
    _, build, tolerance = case
    args, attributes = build(np.random.default_rng())
    expected = load_kernel(name, "reference")(*args, **attributes)
    got = load_kernel(name, "cpu")(*args, **attributes)
    for g, e in zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]:
        np.testing.assert_allclose(g, e, rtol=0, atol=tolerance)


def test_every_operator_has_cases():
    assert set(CASES) == set(OPS)
