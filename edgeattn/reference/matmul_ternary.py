"""Ternary weights, -1, 0 and 1, in panels of 16 outputs; see `unpack_ternary` for the layout."""
import numpy as np

from edgeattn.ops import PANEL
from edgeattn.reference.matmul_nbits import pack_panels, unpack_panels

BLOCK = 128  # K is padded to a multiple of it: stock onnxruntime's block


def pack_ternary(w: np.ndarray, *, bits: int = 2) -> np.ndarray:
    """Weights -1, 0 and 1 to the stored layout. Outputs and K are padded with zeros.

    w   [N, K]                              int8
    ->  [ceil(N / 16), steps, 16, 4]        uint8; steps of 16 K, a multiple of 8
    ValueError for other bits.
    """
    _check(bits)
    blocks, panels = -(-w.shape[1] // BLOCK), -(-len(w) // PANEL)
    codes, _, _ = pack_panels((w + 2).astype(np.uint8), np.zeros((len(w), blocks)), bits=2, block_size=BLOCK)
    return codes.reshape(panels, -1, PANEL, 4)


def unpack_ternary(codes: np.ndarray, *, bits: int = 2, K: int, N: int) -> np.ndarray:
    """The weights [N, K] int8: 2-bit codes w + 2 in the panels of matmul_nbits, byte 4 * output + j of step s holding those of
    k = 16 * s + 4 * j ... + 3, low bits first."""
    _check(bits)
    panels = codes.shape[0]
    blocks = codes.reshape(panels, -1, BLOCK // 16, PANEL, 4)
    ones = np.ones((panels, blocks.shape[1], PANEL), np.float16)
    return unpack_panels(blocks, ones, bits=2, block_size=BLOCK, K=K, N=N).astype(np.int8)


def matmul_ternary(x, codes, scales, bias=None, *, bits, activation_bits, K, N):
    """x, rounded to integers per token, times ternary weights, transposed (BitNet b1.58, arXiv 2402.17764; a4.8, arXiv 2411.04965).

    x       [tokens, K]             float32
    codes   [panels, steps, 16, 4]  uint8; see unpack_ternary
    scales  [N]                     float32, what an output's weights are multiplied by
    bias    [N]                     float32, optional
    ->      [tokens, N]             float32
    The rounding is part of the model: see quantise_tokens.
    """
    q, factor = quantise_tokens(x, activation_bits)
    weight = unpack_ternary(codes, bits=bits, K=K, N=N).astype(np.float32)
    out = q @ weight.T / factor * scales  # float32 holds these sums of integers exactly
    return (out if bias is None else out + bias).astype(np.float32)


def quantise_tokens(x, activation_bits):
    """(x [tokens, K] as integers of that many bits, signed, in float32; the factor [tokens, 1] by which each token was multiplied).

    8 bits: 127 over the largest absolute value; 4 bits: the square root of 7 over the mean absolute value. Both are at least 1e-5.
    """
    if activation_bits == 8:
        factor = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    elif activation_bits == 4:
        mean = np.abs(x).mean(-1, keepdims=True, dtype=np.float64).astype(np.float32)
        factor = np.sqrt(np.float32(7)) / np.maximum(mean, np.float32(1e-5))
    else:
        raise ValueError(f"activations of ternary weights have 4 or 8 bits, got {activation_bits}")
    top = 1 << (activation_bits - 1)
    return np.clip(np.rint(x * factor), -top, top - 1), factor


def _check(bits):
    if bits != 2:
        raise ValueError(f"ternary weights are stored in 2 bits, got {bits}")
