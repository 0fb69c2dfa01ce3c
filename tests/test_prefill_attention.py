"""Attention of prompts over what a list names: pages and single keys, in 8 bits, against the plan's own contract."""
import numpy as np
import pytest

from edgeattn.kernels_cpu import antidiagonal_weights, score_excess
from edgeattn.kernels_cpu.stored_keys import StoredKeys
from edgeattn.kernels_cpu import rotate_heads
from edgeattn.prefill_lists import write_lists
from edgeattn.prefill_corrections import delta, tail
from edgeattn.prefill_plan import PAGE, QUERIES, PrefillPlan, attend, forced, pool, shape_of, spread
from edgeattn.prefill_scheduler import Keys
from edgeattn.reference.cached_attention import rotate
from kv_driver import Driver, dequantise, hadamard
from test_kv_attention import cache_of, with_threads


def random_plan(rng, kv_heads, n, m, part, columns, alone=0.05):
    blocks = rng.random((kv_heads, *shape_of(n, m))) < part
    blocks = blocks & forced(n, m, 10 ** 6) | forced(n, m)
    single = (rng.random((*blocks.shape[:2], m)) < alone) & ~spread(blocks, m) if columns else None
    return PrefillPlan(blocks, single, n, m)


def error(driver, sequence, parts, out, plan, correct=lambda out, lse, *x: (out, lse)):
    """Of the output's norm, the mean and the largest over rows, against the plan over the cache's own values.
    correct: a function of prefill_corrections.py, without its scale."""
    q, n = parts[0], parts[0].shape[1]
    found = []
    for layer in range(driver.layers):
        pairs = [dequantise(driver.cache, sequence, layer, head) for head in range(driver.kv_heads)]
        queries = driver.rotated(q[layer], sequence).transpose(1, 0, 2)
        k, v = (np.stack(x) for x in zip(*pairs))
        expected, _ = correct(*attend(queries, k, v, plan, driver.scale), queries, k, v)
        expected = expected.transpose(1, 0, 2)
        found.append(np.linalg.norm(out[layer] - expected, axis=-1) / np.linalg.norm(expected, axis=-1))
    assert np.shape(found)[1] == n
    return np.mean(found), np.max(found)


@pytest.mark.parametrize("types", ["f16", "int8", "int4", "int4/int2"])
@pytest.mark.parametrize("group, head_dim", [(1, 64), (4, 64), (7, 128), (8, 80), (2, 256)])
def test_what_a_plan_names_is_read_and_nothing_else(types, group, head_dim):
    rng = np.random.default_rng()
    n, past, columns = int(rng.integers(2, 200)), int(rng.integers(0, 500)), bool(rng.integers(2))
    print(n, past, columns)
    cache = cache_of(types, tokens=1024, layers=2, kv_heads=2, head_dim=head_dim)
    driver, sequence = Driver(cache, group), cache.new_sequence()
    if past:
        driver.fill(sequence, past, check=False)
    parts, plan = driver.random(n), random_plan(rng, 2, n, past + n, 0.3, columns)
    lists = write_lists([plan])
    out, = driver.forward([(sequence, parts)], check=False, settle=False, lists=[lists.ctypes.data])
    mean, most = error(driver, sequence, parts, out, plan)
    assert mean < 0.04 and most < 0.15


def test_a_plan_of_everything_is_the_dense_answer():
    cache = cache_of("int4", tokens=1024)
    driver, sequence = Driver(cache, 4), cache.new_sequence()
    driver.fill(sequence, 400, check=False)
    parts, everything = driver.random(150), PrefillPlan(np.ones((2, 3, -(-550 // PAGE)), bool), None, 150, 550)
    dense, = driver.forward([(sequence, parts)], check=False, settle=False)
    cache.truncate(sequence, 400)
    listed, = driver.forward([(sequence, parts)], check=False, settle=False, lists=[write_lists([everything]).ctypes.data])
    error = np.linalg.norm(listed - dense, axis=-1) / np.linalg.norm(dense, axis=-1)
    assert error.mean() < 0.04  # keys are rounded about another mean


@pytest.mark.parametrize("correction", ["tail", "delta"])
@pytest.mark.parametrize("types, options", [("f16", {}), ("int8", {}), ("int4/int2", {}), ("int4", {"storage": "hadamard"})])
@pytest.mark.parametrize("group, head_dim", [(1, 64), (4, 64), (7, 128), (8, 80), (2, 256)])
def test_what_is_not_read_is_made_good_as_the_contract_says(types, options, group, head_dim, correction):
    rng = np.random.default_rng()
    if options and head_dim == 80:
        head_dim = 96
    n, past, columns = int(rng.integers(2, 250)), int(rng.integers(300, 600)), bool(rng.integers(2))
    print(n, past, columns)
    cache = cache_of(types, tokens=1024, layers=1, kv_heads=2, head_dim=head_dim, **options)
    driver, sequence = Driver(cache, group), cache.new_sequence()
    driver.fill(sequence, past, check=False)
    parts, plan = driver.random(n), random_plan(rng, 2, n, past + n, 0.2, columns, 0.01)
    q, k, v = (x[0] for x in parts)
    cache.append(sequence, n)
    means = Keys(cache, sequence, 0, driver.rotated(k, sequence)).page_means(v) if correction == "tail" else None
    cache.truncate(sequence, past)
    if sequence.length != past:  # the cut went through a sealed page
        pytest.fail("the test's own cache lost tokens")
    lists = write_lists([plan], correction, means)
    out, = driver.forward([(sequence, parts)], check=False, settle=False, lists=[lists.ctypes.data])

    def correct(out, lse, q, k, v):
        return tail(out, lse, q, k, v, plan, driver.scale) if correction == "tail" else delta(out, lse, q, k, v, driver.scale, QUERIES)
    mean, most = error(driver, sequence, parts, out, plan, correct)
    assert mean < 0.05 and (most < 0.2 or correction == "delta")  # what is shifted may be next to nothing
    assert mean < 0.5 * error(driver, sequence, parts, out, plan)[0]  # and nothing else would do


def test_pages_of_next_to_no_weight_are_left_out_within_their_bound():
    """Each of the 128 keys that are weighed together adds less than 2**-skip of the largest weight."""
    cache, outs = cache_of("int4", tokens=2048, layers=1), []
    driver, sequence = Driver(cache, 4), cache.new_sequence()
    driver.fill(sequence, 1000, check=False)
    parts = driver.random(100)
    parts[0][:] *= 6
    plan = PrefillPlan(np.ones((2, *shape_of(100, 1100)), bool), None, 100, 1100)
    for skip in (1e30, 12, 0):
        lists = write_lists([plan], skip=skip)
        outs.append(driver.forward([(sequence, parts)], check=False, settle=False, lists=[lists.ctypes.data])[0])
        cache.truncate(sequence, 1000)
    size = np.linalg.norm(outs[0], axis=-1).mean()
    little, much = (np.linalg.norm(out - outs[0], axis=-1).mean() / size for out in outs[1:])
    assert 0 < little < 2 * 1100 * 2.0 ** -12 and much > 0.05


def test_later_tokens_change_nothing():
    """K and V behind a query, the ones of its own page included."""
    cache, rng = cache_of("int4", tokens=1024), np.random.default_rng()
    driver, outs = Driver(cache, 4), []
    start, parts = driver.random(300), driver.random(120)
    plan = random_plan(rng, 2, 120, 420, 0.4, True)
    for seed in range(2):
        sequence = cache.new_sequence()
        driver.forward([(sequence, [x[:, :256] for x in start])], check=False)
        driver.forward([(sequence, [x[:, 256:] for x in start])], check=False)
        changed = [x.copy() for x in parts]
        for x in changed[1:]:
            x[:, 70:] = rng.standard_normal(x[:, 70:].shape)
        outs.append(driver.forward([(sequence, changed)], check=False, settle=False, lists=[write_lists([plan]).ctypes.data])[0][:, :64])
        cache.truncate(sequence, 0)
    np.testing.assert_allclose(*outs, atol=0)  # the first block of queries ends before token 70


def test_threads_and_neighbours_change_nothing():
    rng, results = np.random.default_rng(3), []
    cache = cache_of("int4", tokens=2048, ubatch=512)
    driver = Driver(cache, 4)
    history, parts, other = driver.random(300), driver.random(130), driver.random(40)
    plan = random_plan(rng, 2, 130, 430, 0.4, True)

    def run(both):
        a, b = cache.new_sequence(), cache.new_sequence()
        driver.forward([(a, history)], check=False)
        work, lists = [(a, parts)], [write_lists([plan])]
        if both:
            work, lists = [(b, other), *work], [None, *lists]
        out = driver.forward(work, check=False, settle=False, lists=[0 if x is None else x.ctypes.data for x in lists])
        results.append(out[-1])
        cache.truncate(a, 0), cache.truncate(b, 0)
    for threads, both in ((1, False), (2, False), (1, True)):
        with_threads(threads, lambda: run(both))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("types, options", [("int4", {}), ("f16", {}), ("int4", {"storage": "hadamard"}), ("int4", {"storage": "zipcache"}),
                                            ("int8/int2", {})])
def test_pages_tell_the_mean_of_their_keys(types, options):
    cache, rng = cache_of(types, tokens=1024, layers=2, **options), np.random.default_rng()
    driver, sequence = Driver(cache, 4), cache.new_sequence()
    driver.fill(sequence, int(rng.integers(100, 400)), check=False)
    new = rng.standard_normal((int(rng.integers(1, 100)), 2, 64)).astype(np.float32)
    cache.append(sequence, len(new))
    keys = Keys(cache, sequence, 1, new)
    for head in range(2):
        assert len(keys[head]) == keys.tokens
        np.testing.assert_allclose(keys.means[head], pool(keys[head], PAGE), atol=1e-5)


@pytest.mark.parametrize("types, options", [("int4", {}), ("f16", {}), ("f32", {}), ("int4", {"storage": "hadamard"}), ("int8/int2", {}),
                                            ("int3", {"storage": "zipcache"}), ("delta/int4", {"storage": "delta"})])
def test_operators_that_estimate_read_the_same_from_pages_as_from_arrays(types, options):
    cache, rng = cache_of(types, tokens=4096, layers=2, **options), np.random.default_rng()
    driver, sequence = Driver(cache, 2), cache.new_sequence()
    driver.fill(sequence, int(rng.integers(100, 3000)), check=False)
    new = rng.standard_normal((int(rng.integers(1, 300)), 2, 64)).astype(np.float32)
    cache.append(sequence, len(new))
    keys, q = Keys(cache, sequence, 1, new), rng.standard_normal((4, len(new), 64)).astype(np.float32)
    here, arrays = keys.stored(), StoredKeys.of([keys[head] for head in range(2)])
    assert len(here) == len(arrays) == keys.tokens and here.entries.shape[1] == (keys.tokens - len(new)) // PAGE
    np.testing.assert_array_equal(here.mean(len(new)), arrays.mean(len(new)))
    first, last = sorted(rng.integers(0, -(-keys.tokens // PAGE), 2).tolist())
    for head in range(2):
        np.testing.assert_array_equal(here.floats(head, first, last), keys[head][first * PAGE:last * PAGE])
    weights, excess = zip(*((antidiagonal_weights.run(q, x, x.mean(len(new)), 0.125, 8), score_excess.run(
        q, x.pages(first, last + 1), q.mean(1), x.mean(len(new)), np.zeros((4, len(new))), 0.125, 4)) for x in (here, arrays)))
    np.testing.assert_array_equal(*weights)
    np.testing.assert_array_equal(*excess)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("head_dim, half", [(64, 32), (64, 12), (128, 64), (96, 48)])
def test_heads_are_rotated_as_attention_rotates_them(head_dim, half, interleaved, turned):
    rng = np.random.default_rng()
    fused = rng.standard_normal((50, 7 * head_dim)).astype(np.float32)
    x, positions = fused[:, head_dim:4 * head_dim], rng.integers(0, 300, 50)
    cos, sin = rng.standard_normal((2, 300, half)).astype(np.float32)
    turn = hadamard(head_dim) if turned else np.eye(head_dim)
    expected = rotate(x.reshape(50, 3, head_dim), cos[positions], sin[positions], interleaved) @ turn
    got = rotate_heads.run(x, cos, sin, positions, head_dim, interleaved, turned)
    np.testing.assert_allclose(got, expected.swapaxes(0, 1), atol=1e-5)


def test_threads_and_neighbours_do_not_change_an_estimate():
    rng, results = np.random.default_rng(), []
    q, k = rng.standard_normal((8, 200, 64)).astype(np.float32), rng.standard_normal((2, 5000, 64)).astype(np.float32)
    limits = np.zeros((8, 200), np.float32)

    def run(heads):
        rows, keys = q[:4 * heads], StoredKeys.of(k[:heads])
        mean = keys.mean(200)
        results.append((antidiagonal_weights.run(rows, keys, mean, 0.125, 8)[:4],
                        score_excess.run(rows, keys, rows.mean(1), mean, limits[:4 * heads], 0.125, 4)[:4]))
    for threads, heads in ((1, 2), (2, 2), (2, 1)):
        with_threads(threads, lambda: run(heads))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0][0], other[0])
        np.testing.assert_array_equal(results[0][1], other[1])
