"""matmul_ternary inside larger arrays, its packed forms, the largest sums, and rounding against float64."""
from pathlib import Path

import numpy as np
import pytest
from numba import config, get_num_threads, set_num_threads

from edgeattn.kernels_cpu.gemv_nbits import GROUPED
from edgeattn.kernels_cpu.matmul_ternary import ARGS, matmul_ternary, step, workspace_bytes
from edgeattn.kernels_cpu.steps import call
from edgeattn.reference.matmul_ternary import matmul_ternary as reference
from edgeattn.reference.matmul_ternary import MAX_K, pack_ternary, quantise_tokens, unpack_ternary

FORMS = [dict(bits=2), dict(bits=1), dict(bits=2, input_major=1)]


@pytest.fixture
def threads():
    before = get_num_threads()
    yield set_num_threads
    set_num_threads(before)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("n, k", [(1, 1), (37, 300), (600, 128), (256, 2560)])
def test_packed_forms_hold_the_weights(form, n, k):
    w = np.random.default_rng().integers(-1, 2, (n, k), np.int8)
    codes = pack_ternary(w, **form)
    np.testing.assert_array_equal(unpack_ternary(codes, **form, K=k, N=n), w)
    if (n, k) == (256, 2560):
        assert codes.nbytes == n * k // (5 if form["bits"] == 1 else 4)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("tokens, n, k", [(1, 2050, 1030), (3, 1000, 1100), (4, 300, 2000), (7, 1000, 1100), (20, 300, 1100),
                                          (65, 77, 300)])
def test_threads_and_strides(form, count, tokens, n, k, threads):
    if count > config.NUMBA_NUM_THREADS:
        pytest.skip(f"needs {count} threads, this process has {config.NUMBA_NUM_THREADS}")
    threads(count)
    rng = np.random.default_rng()
    weights = pack_ternary(rng.integers(-1, 2, (n, k), np.int8), **form), (rng.random(n) + 0.5).astype(np.float32)
    x, out = np.full((tokens, k + 24), np.nan, np.float32), np.full((tokens + 2, n + 37), np.nan, np.float32)
    x[:, 8:k + 8] = rng.standard_normal((tokens, k)) * (rng.random((tokens, k)) < 0.3)
    bias, attributes = rng.standard_normal(n, np.float32), dict(activation_bits=8, K=k, N=n, **form)
    tensors = dict(x=x[:, 8:k + 8], codes=weights[0], scales=weights[1], bias=bias, out=out[1:-1, 5:n + 5])
    call(step, ARGS, tensors, attributes, workspace_bytes=workspace_bytes)
    np.testing.assert_allclose(out[1:-1, 5:n + 5], reference(x[:, 8:k + 8], *weights, bias, **attributes), rtol=0, atol=1e-5 * k ** 0.5)
    out[1:-1, 5:n + 5] = np.nan
    assert np.isnan(out).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_largest_sums_are_exact(form, tokens):
    """Every input at 127 and every weight at one: the sum of as many as there may be."""
    w = np.repeat(np.array([[1], [-1], [0]], np.int8), MAX_K, 1)
    x = np.ones((tokens, MAX_K), np.float32) * np.where(np.arange(tokens) % 2, -1, 1).astype(np.float32)[:, None]
    got = matmul_ternary(x, pack_ternary(w, **form), np.ones(3, np.float32), activation_bits=8, K=MAX_K, N=3, **form)
    np.testing.assert_allclose(got, x[:, :1] * np.array([MAX_K, -MAX_K, 0], np.float32), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_token_alone_and_among_others_gives_the_same(form):
    rng, n, k = np.random.default_rng(), 100, 700
    weights = pack_ternary(rng.integers(-1, 2, (n, k), np.int8), **form), (rng.random(n) + 0.5).astype(np.float32)
    x, about = rng.standard_normal((30, k), np.float32), dict(activation_bits=8, K=k, N=n, **form)
    alone = np.concatenate([matmul_ternary(row[None], *weights, **about) for row in x])
    for rows in range(2, GROUPED + 1):
        np.testing.assert_array_equal(matmul_ternary(x[:rows], *weights, **about), alone[:rows])
    for rows in (GROUPED + 1, len(x)):
        np.testing.assert_allclose(matmul_ternary(x[:rows], *weights, **about), alone[:rows], rtol=0, atol=2e-5)


@pytest.mark.parametrize("activation_bits", [4, 8])
def test_reference_is_the_papers_formula(activation_bits):
    """In float64: 127 / max |x|, and the square root of 7 / mean |x|; the error against exact products is that of the rounding."""
    rng, n, k = np.random.default_rng(), 50, 400
    w, x, scales = rng.integers(-1, 2, (n, k), np.int8), rng.standard_normal((9, k), np.float32), rng.random(n).astype(np.float32)
    x[0] = 0
    size = np.abs(x.astype(np.float64))
    factor = 127 / np.maximum(size.max(1), 1e-5) if activation_bits == 8 else 7 ** 0.5 / np.maximum(size.mean(1), 1e-5)
    q, got = quantise_tokens(x, activation_bits)
    np.testing.assert_allclose(got[:, 0], factor, rtol=1e-6)
    inside = np.abs(x * factor[:, None]) < (127.5 if activation_bits == 8 else 7.5)
    assert (np.abs(q - x * factor[:, None])[inside] <= 0.5 + 1e-4).all()
    out = reference(x, pack_ternary(w), scales, bits=2, activation_bits=activation_bits, K=k, N=n)
    np.testing.assert_allclose(out, (q.astype(np.float64) / factor[:, None]) @ w.T * scales, rtol=0, atol=1e-4)


@pytest.mark.parametrize("about, said", [(dict(bits=3), "2 bits, or in 1.6"), (dict(bits=1, input_major=1), "input by input have 2 bits")])
def test_forms_that_do_not_exist(about, said):
    with pytest.raises(ValueError, match=said):
        pack_ternary(np.zeros((16, 64), np.int8), **about)
    with pytest.raises(ValueError, match="at most 32768 inputs"):
        pack_ternary(np.zeros((1, MAX_K + 1), np.int8))


def test_exports_of_every_layout_agree(tmp_path):
    from edgeattn.exporters.export import export
    from edgeattn.runtime import Model
    checkpoint, tokens = Path(__file__).parent.parent / "models/nano-ternary", np.arange(2, 40)
    found = {}
    for layout in ("panels", "sparse", "dense"):
        assert export(checkpoint, tmp_path / layout, ternary_layout=layout)["verify"]["rms_error"] < 0.1
        model = Model.load(tmp_path / layout, ctx_size=64)
        sequence = model.new_sequence()
        prompt = model.forward([(sequence, tokens)], "all")
        found[layout] = np.concatenate([prompt, model.forward([(sequence, np.array([7]))], "all")])
    for layout in ("sparse", "dense"):
        np.testing.assert_allclose(found[layout], found["panels"], rtol=0, atol=1e-2 * found["panels"].std())
    assert (tmp_path / "dense/model.onnx.data").stat().st_size < (tmp_path / "panels/model.onnx.data").stat().st_size
    with pytest.raises(ValueError, match="unknown layout of ternary weights 'rows'"):
        export(checkpoint, tmp_path / "other", ternary_layout="rows")
