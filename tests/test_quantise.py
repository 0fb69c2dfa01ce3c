"""The quantiser's properties, and the pieces that feed it."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeattn.exporters.checkpoint import Weight, concatenate
from edgeattn.exporters.quantisers import dequantise
from edgeattn.exporters.quantisers.rtn import quantise
from edgeattn.exporters.rope import inverse_frequencies


shapes = st.tuples(st.integers(1, 20), st.integers(1, 150))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, bits=st.sampled_from([2, 3, 4, 8]), block_size=st.sampled_from([16, 32, 64, 128, 256]), seed=st.integers(0, 2**32 - 1),
       size=st.floats(1e-3, 1e3), tail=st.booleans())
def test_error_is_bounded_and_padding_is_zero(shape, bits, block_size, seed, size, tail):
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal(shape) * (np.exp(rng.standard_normal(shape)) if tail else 1) * size).astype(np.float32)
    codes, scales, _ = quantise(w, bits, block_size)
    assert codes.dtype == np.uint8 and codes.max() < 1 << bits and scales.dtype == np.float16
    restored = dequantise(codes, scales, None, bits)
    assert not restored[:, shape[1]:].any()
    padded = np.zeros_like(restored)
    padded[:, :shape[1]] = w
    error = np.square(restored - padded).reshape(*scales.shape, block_size).sum(-1)
    peak = np.abs(padded).reshape(*scales.shape, block_size).max(-1)
    assert (error <= block_size * np.square(peak / (1 << (bits - 1)) * 0.6) + 1e-12 * size).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_worse_than_the_largest_weights_own_scale(bits):
    w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    codes, scales, _ = quantise(w, bits, 32)
    blocks, zero = w.reshape(-1, 32), 1 << (bits - 1)
    plain = -np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1) / zero
    simple = np.clip(np.rint(blocks / plain), -zero, zero - 1) * plain
    ours = np.square(dequantise(codes, scales, None, bits) - w).sum()
    assert ours < np.square(simple - blocks).sum() * (0.95 if bits < 8 else 1.001)


@pytest.mark.parametrize("w", [np.zeros((3, 40)), np.full((3, 40), 1e-9), np.full((3, 40), 2.5), np.full((3, 40), -2.5)],
                         ids=["zeros", "below float16", "constant", "negative constant"])
def test_extreme_blocks(w):
    restored = dequantise(*quantise(w.astype(np.float32), 4, 16), 4)[:, :40]
    np.testing.assert_allclose(restored, w, rtol=1e-3, atol=1e-8)


def test_exact_grid_is_kept():
    codes = np.random.default_rng(1).integers(-8, 8, (16, 64)).astype(np.float32)
    codes[:, ::16] = -8
    np.testing.assert_array_equal(dequantise(*quantise(codes * 0.25, 4, 16), 4), codes * 0.25)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), data=st.data())
def test_concatenated_rows(sizes, data):
    parts = [np.random.default_rng(i).standard_normal((n, 3)).astype(np.float32) for i, n in enumerate(sizes)]
    joined = concatenate([Weight(part.shape, lambda a, b, part=part: part[a:b]) for part in parts])
    start = data.draw(st.integers(0, sum(sizes)))
    stop = data.draw(st.integers(start, sum(sizes)))
    np.testing.assert_array_equal(joined.read(start, stop), np.concatenate(parts)[start:stop])


def test_default_frequencies():
    np.testing.assert_allclose(inverse_frequencies({"rope_theta": 100.0}, 4), [1, 0.1])
