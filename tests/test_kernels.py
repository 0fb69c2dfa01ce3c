"""Every operator's CPU kernel against its NumPy reference, on fresh random inputs."""
import numpy as np
import pytest

from edgeattn.ops import OPS, load_kernel

# One entry an operator: a list of (id, arguments, keywords, tolerance) builders. Cases build their inputs from a Generator.
CASES = {
    "add": [
        ("one", lambda rng: ((rng.standard_normal((1, 1), np.float32),) * 2, {}), 0),
        ("ragged", lambda rng: ((rng.standard_normal((5, 77), np.float32), rng.standard_normal((5, 77), np.float32)), {}), 0),
    ],
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
