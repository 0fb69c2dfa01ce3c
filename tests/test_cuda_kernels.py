"""The dense operators' CUDA kernels against their NumPy references, on fresh random inputs: the CPU kernels' cases and more."""
import numpy as np
import pytest
from cuda_device import needs_cuda
from test_kernels import sample_with_nan

from edgeattn.kernels_cuda import add, gated_activation, matmul_nbits, rms_normalization, steps
from edgeattn.ops import load_kernel
from edgeattn.reference.matmul_nbits import matmul_nbits as reference
from edgeattn.reference.matmul_nbits import quantise_activations
from edgeattn.verification.cases import CASES, logits, matmul_ternary_case, quantised

pytestmark = needs_cuda
DENSE = ("add", "embedding", "embedding_nbits", "gather_rows", "gather_columns", "gated_activation", "linear", "matmul_nbits",
         "matmul_ternary", "rms_normalization", "sample")


@pytest.mark.parametrize("name, case", [pytest.param(n, c, id=f"{n}-{c[0]}") for n in DENSE for c in CASES[n]])
def test_kernel_matches_reference(name, case):
    _, build, tolerance = case
    args, attributes = build(np.random.default_rng())
    if attributes.get("input_major") or attributes.get("bits") == 1:
        with pytest.raises(ValueError, match="CPU"):
            load_kernel(name, "cuda")(*args, **attributes)
        return
    expected = load_kernel(name, "reference")(*args, **attributes)
    np.testing.assert_allclose(load_kernel(name, "cuda")(*args, **attributes), expected, rtol=0, atol=tolerance)


def close(got, expected, k):
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-6 * k ** 0.5)


@pytest.mark.parametrize("seed", range(40))
def test_matmul_nbits_of_any_shape(seed):
    rng = np.random.default_rng()
    tokens, bits = int(rng.choice([1, 1, 2, 3, 5, 8, 9, 17, 130])), int(rng.choice([2, 3, 4, 8]))
    size, zeros = int(2 ** rng.integers(5 if bits == 3 else 4, 9)), (False, True, "half")[rng.integers(3)]
    n, k = (int(2 ** rng.uniform(0, 10)) for _ in range(2))
    x = quantise_activations(rng.standard_normal((tokens, k), np.float32), size)
    weights, bias = quantised(rng, n, k, bits, size, zeros), rng.standard_normal(n, np.float32) if rng.random() < 0.5 else None
    about = dict(bits=bits, block_size=size, K=k, N=n)
    close(load_kernel("matmul_nbits", "cuda")(x, *weights, bias, **about), reference(x, *weights, bias, **about), k)


@pytest.mark.parametrize("n, k, bits, size", [
    (4096, 4096, 4, 32), (1000, 14336, 4, 32), (2048, 2048, 8, 32), (20000, 256, 4, 32), (4100, 512, 8, 32), (4096, 2048, 2, 32),
    (1000, 4096, 3, 32), (1000, 4096, 4, 128), (100, 14336, 4, 128), (300, 8008, 8, 256), (300, 2080, 3, 64), (64, 200, 2, 128)])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_matmul_nbits_of_a_model_s_size(n, k, bits, size, tokens):
    rng = np.random.default_rng()
    x, weights, about = quantise_activations(rng.standard_normal((tokens, k), np.float32), size), quantised(rng, n, k, bits, size), \
        dict(bits=bits, block_size=size, K=k, N=n)
    close(load_kernel("matmul_nbits", "cuda")(x, *weights, **about), reference(x, *weights, **about), k)


@pytest.mark.parametrize("tokens, n, k, bits, size, zeros", [
    (10, 70, 4100, 4, 32, False), (17, 130, 2050, 8, 64, True), (40, 64, 3000, 3, 32, False), (64, 100, 4096, 4, 128, "half"),
    (64, 33, 2100, 2, 32, True), (70, 64, 2080, 4, 32, False), (150, 80, 2048, 8, 32, False)])
def test_matmul_nbits_of_tiles_that_blocks_share(tokens, n, k, bits, size, zeros):
    """Few tiles, long sums: ranges of K that the last block adds up, in one order, so that results are the same each time."""
    rng = np.random.default_rng()
    x, weights = quantise_activations(rng.standard_normal((tokens, k), np.float32), size), quantised(rng, n, k, bits, size, zeros)
    about, out = dict(bits=bits, block_size=size, K=k, N=n), [np.zeros((tokens, n), np.float32) for _ in range(2)]
    for each in out:
        tensors = dict(x=x, codes=weights[0], scales=weights[1].view(np.uint16), zero_points=weights[2], out=each)
        assert steps.call(matmul_nbits, tensors, about)[-1].grid[2] > 1
    close(out[0], reference(x, *weights, **about), k)
    np.testing.assert_array_equal(*out)


@pytest.mark.parametrize("tokens, n, k, bits, size", [
    (1, 1030, 544, 4, 32), (3, 1000, 544, 8, 32), (4, 520, 1100, 4, 64), (20, 300, 1100, 4, 32),
                                                      (65, 77, 300, 8, 128)])
def test_matmul_nbits_inside_larger_arrays(tokens, n, k, bits, size):
    rng = np.random.default_rng()
    weights, bias = quantised(rng, n, k, bits, size, True), rng.standard_normal(n, np.float32)
    x, out = np.full((tokens, k + 24), np.nan, np.float32), np.full((tokens + 2, n + 37), np.nan, np.float32)
    x[:, 8:k + 8] = quantise_activations(rng.standard_normal((tokens, k), np.float32), size)
    tensors = dict(x=x[:, 8:k + 8], codes=weights[0], scales=weights[1].view(np.uint16), zero_points=weights[2], bias=bias,
                   out=out[1:-1, 5:n + 5])
    about = dict(bits=bits, block_size=size, K=k, N=n)
    steps.call(matmul_nbits, tensors, about)
    close(out[1:-1, 5:n + 5], reference(x[:, 8:k + 8], *weights, bias, **about), k)
    out[1:-1, 5:n + 5] = np.nan
    assert np.isnan(out).all()


@pytest.mark.parametrize("tokens", [1, 5, 9])
@pytest.mark.parametrize("size", [32, 128])
def test_matmul_nbits_rounds_activations_like_the_reference(tokens, size):
    rng = np.random.default_rng()
    weights, about = quantised(rng, 64, 512, 4, size, True), dict(bits=4, block_size=size, K=512, N=64)
    x = rng.standard_normal((tokens, 512), np.float32) * rng.lognormal(size=(tokens, 1)).astype(np.float32)
    x[tokens // 2, :140] = 0
    expected = reference(quantise_activations(x, size), *weights, **about)
    np.testing.assert_allclose(load_kernel("matmul_nbits", "cuda")(x, *weights, **about), expected, rtol=0, atol=5e-5 * np.abs(x).max())


@pytest.mark.parametrize("tokens", [1, 7, 12])
@pytest.mark.parametrize("code", [0, 255])
def test_the_largest_sums_fit(code, tokens):
    from edgeattn.reference.matmul_nbits import pack_panels
    codes, scales, _ = pack_panels(np.full((16, 256), code, np.uint8), np.ones((16, 1)), bits=8, block_size=256)
    x = np.ones((tokens, 256), np.float32) * np.resize([1, -1], (tokens, 1)).astype(np.float32)
    got = load_kernel("matmul_nbits", "cuda")(x, codes, scales, bits=8, block_size=256, K=256, N=16)
    np.testing.assert_allclose(got, x @ np.full((256, 16), code - 128, np.float32), rtol=1e-6)


@pytest.mark.parametrize("tokens, fewer", [(1, 0), (8, 3), (64, 17)])
def test_a_graph_serves_calls_of_fewer_rows(tokens, fewer):
    """One capture, counts in device memory: rows past the count stay as they were."""
    rng, n, k = np.random.default_rng(), 96, 256
    weights, about = quantised(rng, n, k, 4, 32), dict(bits=4, block_size=32, K=k, N=n)
    x = quantise_activations(rng.standard_normal((tokens, k), np.float32), 32)
    arrays, out, state = steps.Arrays(), np.full((tokens, n), 7, np.float32), np.array([fewer], np.int64)
    a = dict.fromkeys(matmul_nbits.ARGS, 0) | about | {"x.rows": 0, "x.stride": k, "out.stride": n} | {
        name: arrays.address(array) for name, array in dict(x=x, codes=weights[0], scales=weights[1], out=out, state=state).items()}
    scratch = steps.device.cupy().empty(matmul_nbits.workspace_bytes({}, about, tokens, 1), np.uint8)
    graph = steps.Graph(matmul_nbits.launches(a | {"workspace": scratch.data.ptr}, {0: tokens}))
    for _ in range(2):
        graph.launch()
    graph.stream.synchronize()
    arrays.fetch(out)
    close(out[:fewer], reference(x, *weights, **about)[:fewer], k)
    assert (out[fewer:] == 7).all()


@pytest.mark.parametrize("rows", [1, 33])
def test_steps_that_overlap_keep_their_order(rows):
    """A chain in which each step reads what the one before wrote, many times over: a step that starts early must still wait."""
    rng, width = np.random.default_rng(), 512
    x, weight = rng.standard_normal((rows, width), np.float32), np.ones(width, np.float32)
    normal, half, state = np.zeros((rows, width), np.float32), np.zeros((rows, width // 2), np.float32), np.array([rows], np.int64)
    arrays = steps.Arrays()
    at = {name: arrays.address(array) for name, array in dict(x=x, weight=weight, normal=normal, half=half, state=state).items()}
    shape = {"x.rows": 0, "x.stride": width, "x.width": width, "x.groups": 1, "state": at["state"], "out.stride": width}
    norm = shape | {"x": at["x"], "weight": at["weight"], "out": at["normal"], "epsilon": int(np.float32(1e-5).view(np.int32))}
    gate = shape | {"x": at["normal"], "out": at["half"], "out.stride": width // 2, "activation": 0}
    total = shape | {"x": at["half"], "y": at["x"], "out": at["x"], "x.stride": width // 2, "x.width": width // 2, "y.stride": width}
    chain = []
    for _ in range(20):
        chain += rms_normalization.launches(norm, {0: rows}) + gated_activation.launches(gate, {0: rows}) + add.launches(total, {0: rows})
    graph, expected = steps.Graph(chain), x.copy()
    graph.launch()
    graph.stream.synchronize()
    for _ in range(20):
        h = load_kernel("rms_normalization", "reference")(expected, weight, epsilon=1e-5)
        expected[:, :width // 2] += load_kernel("gated_activation", "reference")(h, activation="silu")
    arrays.fetch(x)
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_matmul_ternary_of_any_shape(seed):
    rng = np.random.default_rng()
    tokens, activation_bits = int(rng.choice([1, 1, 2, 3, 5, 8, 9, 24, 25, 130, 300])), int(rng.choice([4, 8]))
    n, k = (int(2 ** rng.uniform(0, 12)) for _ in range(2))
    args, about = matmul_ternary_case(rng, tokens, n, k, 2, activation_bits, rng.random() < 0.5)
    expected = load_kernel("matmul_ternary", "reference")(*args, **about)
    np.testing.assert_allclose(load_kernel("matmul_ternary", "cuda")(*args, **about), expected, rtol=0, atol=2e-5 * about["K"] ** 0.5)


@pytest.mark.parametrize("share", [0.1, 0.9, 1])
@pytest.mark.parametrize("options", [dict(temperature=0), dict(), dict(top_k=40), dict(top_p=0.9, min_p=0.01)], ids=str)
def test_sample_takes_nan_for_minus_infinity(share, options):
    sample_with_nan("cuda", share, options)


@pytest.mark.parametrize("options", [dict(top_k=2000, top_p=0.98765), dict(top_p=0.3), dict(min_p=0.5, temperature=2.0), dict(top_k=1),
                                     dict()], ids=str)
@pytest.mark.parametrize("kind", ["equal", "few", "wide"])
def test_sample_of_odd_logits(kind, options):
    """All equal; three values; far below the first, where all but a few share the last bin."""
    rng, vocab = np.random.default_rng(), 40_000
    x = {"equal": np.ones(vocab, np.float32), "few": rng.integers(0, 3, vocab).astype(np.float32),
         "wide": logits(rng, vocab, 1) - np.float32(200)}[kind]
    x[rng.integers(0, vocab)] += np.float32(kind == "wide") * 190
    options = dict(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, uniform=float(rng.random())) | options
    args = x, rng.integers(0, vocab, 20)
    assert load_kernel("sample", "cuda")(*args, **options)[0] == load_kernel("sample", "reference")(*args, **options)[0]
