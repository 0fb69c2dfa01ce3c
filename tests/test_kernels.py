"""Every operator's CPU kernel against its NumPy reference, on fresh random inputs."""
import ast
from pathlib import Path

import numpy as np
import pytest

from edgeattn.ops import OPS, load_kernel
from edgeattn.verification.cases import CASES, logits


@pytest.mark.parametrize("name, case", [pytest.param(n, c, id=f"{n}-{c[0]}") for n, cases in CASES.items() for c in cases])
def test_kernel_matches_reference(name, case):
    _, build, tolerance = case
    args, attributes = build(np.random.default_rng())
    expected = load_kernel(name, "reference")(*args, **attributes)
    got = load_kernel(name, "cpu")(*args, **attributes)
    for g, e in zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]:
        np.testing.assert_allclose(g, e, rtol=0, atol=tolerance)


@pytest.mark.parametrize("share", [0.1, 0.9, 1])
@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(top_k=40), dict(top_p=0.9, min_p=0.01)], ids=str)
def test_sample_takes_nan_for_minus_infinity(share, options):
    sample_with_nan("cpu", share, options)


def sample_with_nan(device, share, options):
    rng, vocab = np.random.default_rng(), 3001
    x = logits(rng, vocab, 30)
    x[rng.random(vocab) < share] = np.nan
    options = dict(temperature=1, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.1, uniform=float(rng.random())) | options
    token = load_kernel("sample", device)(x, rng.integers(0, vocab, 20), **options)[0]
    assert 0 <= token < vocab and (share == 1 or np.isfinite(x[token]))


def test_every_operator_has_cases():
    assert set(CASES) == set(OPS)


def test_functions_made_by_functions_are_told_apart():
    """By `variant`: under njit alone, code that two processes cached may have one name, and one variant would run for the other."""
    for path in (Path(__file__).parent.parent / "kernels_cpu").glob("*.py"):
        outer = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        for function in (node for made_by in outer for node in made_by.body if isinstance(node, ast.FunctionDef)):
            assert not any("njit" in ast.unparse(d) for d in function.decorator_list), f"{path.name}: {function.name} needs @variant"
