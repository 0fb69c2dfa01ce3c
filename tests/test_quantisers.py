"""Quantisers against their definitions, on random matrices and correlated inputs."""
import numpy as np
import pytest

from edgeattn.exporters.quantisers import Head, Statistics, boa, dequantise, gptq, hqq, load, names, rtn


def problem(n=24, k=96, tokens=400, dead=()):
    """(weights [n, k], inputs [tokens, k] with correlations and a few large columns)."""
    rng = np.random.default_rng()
    x = rng.standard_normal((tokens, k // 3)) @ rng.standard_normal((k // 3, k)) + 0.3 * rng.standard_normal((tokens, k))
    x *= np.exp(rng.standard_normal(k))
    x[:, list(dead)] = 0
    return rng.standard_normal((n, k)).astype(np.float32), x.astype(np.float32)


def statistics(x):
    return Statistics(x.T @ x / np.float32(len(x)), np.abs(x).mean(0))


def loss(change, x):
    return np.square(x.astype(np.float64) @ change.T).sum()


def textbook(weight, hessian, bits, scales, block_size):
    """The paper's algorithm in float64 as it is written: the inverse of the remaining H, updated after every column."""
    k, zero = weight.shape[1], 1 << (bits - 1)
    order = np.argsort(-np.diag(hessian), kind="stable")
    rest, out = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    inverse = np.linalg.inv(hessian.astype(np.float64) + gptq.DAMPING * np.diag(hessian).mean() * np.eye(k))
    for i in order:
        scale = scales[:, i // block_size].astype(np.float64)
        out[:, i] = np.clip(np.rint(rest[:, i] / scale), -zero, zero - 1) * scale
        rest -= ((rest[:, i] - out[:, i]) / inverse[i, i])[:, None] * inverse[i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gptq_equals_the_textbook(bits):
    w, x = problem()
    s = statistics(x)
    codes, scales, zeros = gptq.quantise(w, bits, 32, s)
    assert zeros is None
    got, expected = dequantise(codes, scales, None, bits), textbook(w, s.hessian, bits, scales, 32)
    assert np.isclose(got, expected, rtol=1e-5, atol=1e-6).mean() > 0.99  # a near tie may fall otherwise in float32, and change its row


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("k", [96, 300])
def test_gptq_loses_less_than_rounding(bits, k):
    w, x = problem(k=k, tokens=1500, dead=(5, 40))
    losses = [loss(dequantise(*method.quantise(w, bits, 32, statistics(x)), bits)[:, :k] - w, x) for method in (gptq, rtn)]
    assert losses[0] < 0.8 * losses[1]


def test_gptq_rows_do_not_depend_on_one_another():
    w, x = problem()
    s = statistics(x)
    whole, parts = gptq.quantise(w, 3, 32, s), [gptq.quantise(part, 3, 32, s) for part in (w[:7], w[7:])]
    np.testing.assert_array_equal(whole[1], np.concatenate([part[1] for part in parts]))
    assert (whole[0] == np.concatenate([part[0] for part in parts])).mean() > 0.99


def heads_problem(heads=3, rows=6, k=64):
    """(weights of some heads and a few more rows, statistics with metrics of the heads)."""
    w, x = problem(heads * rows + 5, k, 500)
    rng, s = np.random.default_rng(), statistics(x)
    metrics = [m @ m.T + 0.1 * np.eye(rows) for m in rng.standard_normal((heads, rows, rows // 3))]
    found = tuple(Head(i * rows, (i + 1) * rows, metric, s.hessian) for i, metric in enumerate(metrics))
    return w, Statistics(s.hessian, s.magnitude, found)


def damped(matrix):
    return matrix.astype(np.float64) + gptq.DAMPING * np.diag(matrix).mean() * np.eye(len(matrix))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_boa_equals_the_textbook(bits):
    """One weight of a head after another, with the inverse of what remains of R (x) C."""
    w, s = heads_problem()
    codes, scales, zeros = boa.quantise(w, bits, 32, s)
    got, order = dequantise(codes, scales, None, bits), np.argsort(-np.diag(s.hessian), kind="stable")
    for head in s.heads:
        rows, k = head.stop - head.start, w.shape[1]
        rest, scale = w[head.start:head.stop].astype(np.float64).reshape(-1), scales[head.start:head.stop].astype(np.float64)
        inverse, zero = np.linalg.inv(np.kron(damped(head.metric), damped(head.hessian))), 1 << (bits - 1)
        expected = np.zeros(rows * k)
        for i in (row * k + column for row in range(rows) for column in order):
            step = scale[i // k, i % k // 32]
            expected[i] = np.clip(np.rint(rest[i] / step), -zero, zero - 1) * step
            rest -= (rest[i] - expected[i]) / inverse[i, i] * inverse[i]
            inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        same = np.isclose(got[head.start:head.stop].reshape(-1), expected, rtol=1e-5, atol=1e-6)
        assert same[:k].mean() > 0.99 and same.mean() > 0.9  # a near tie may fall otherwise in float32, and change what follows
    np.testing.assert_array_equal(codes[s.heads[-1].stop:], gptq.quantise(w, bits, 32, s)[0][s.heads[-1].stop:])


@pytest.mark.parametrize("bits", [2, 3])
def test_boa_costs_heads_less(bits):
    problems = [heads_problem(heads=8, rows=16, k=128) for _ in range(5)]  # of one, some in a hundred miss the mark

    def cost(method, w, s):
        change = dequantise(*method.quantise(w, bits, 32, s), bits) - w
        return sum(np.trace(h.metric @ change[h.start:h.stop] @ h.hessian @ change[h.start:h.stop].T) for h in s.heads)
    assert np.mean([cost(boa, *p) / cost(gptq, *p) for p in problems]) < 0.8


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_hqq_objective_falls(bits):
    rng = np.random.default_rng()
    w = rng.standard_t(4, (40, 128)).astype(np.float32)
    codes, scales, zeros = hqq.quantise(w, bits, 64)
    assert zeros.dtype == np.float16 and codes.max() < 1 << bits

    def objective(restored):
        return (np.abs(restored - w) ** hqq.P).sum()
    blocks = w.reshape(40, 2, 64)
    scale = scales.astype(np.float32)[..., None]
    plain = -blocks.min(-1, keepdims=True) / scale
    start = (np.clip(np.rint(blocks / scale + plain), 0, (1 << bits) - 1) - plain) * scale
    assert objective(dequantise(codes, scales, zeros, bits)) < objective(start.reshape(w.shape))


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("w", [np.zeros((3, 40)), np.full((3, 40), 2.5), np.full((3, 40), 1e-9)], ids=["zeros", "constant", "tiny"])
def test_extreme_weights(name, w):
    _, x = problem(k=39)
    s = Statistics(np.eye(40, dtype=np.float32), np.ones(40, np.float32))
    restored = dequantise(*load(name).quantise(w.astype(np.float32), 3, 32, s), 3)[:, :40]
    np.testing.assert_allclose(restored, w, rtol=2e-3, atol=1e-6)


def test_importance_of_columns_is_heeded():
    rng = np.random.default_rng()
    w, importance = rng.standard_normal((50, 64)).astype(np.float32), np.exp(2 * rng.standard_normal(64)).astype(np.float32)

    def weighed(scales):
        c = rtn.nearest(w.reshape(-1, 32), scales.astype(np.float32).reshape(-1), 3) * scales.astype(np.float32).reshape(-1, 1)
        return (np.square(c.reshape(w.shape) - w) * importance).sum()
    assert weighed(rtn.search(w, 3, 32, importance)) < weighed(rtn.search(w, 3, 32))
