"""Ternary weights, -1, 0 and 1, in panels of 16 outputs; see `unpack_ternary` for the layout."""
import numpy as np

from edgeattn.ops import PANEL
from edgeattn.reference.matmul_nbits import pack_panels, unpack_panels

BLOCK = 128  # K of 2-bit codes is padded to a multiple of it: stock onnxruntime's block
TRITS = 5    # digits of a byte of the dense codes, whose K is padded to a multiple of two steps


def pack_ternary(w: np.ndarray, *, bits: int = 2) -> np.ndarray:
    """Weights -1, 0 and 1 to the stored layout. Outputs and K are padded with zeros.

    w     [N, K]                            int8
    bits  2, or 1, which stands for five weights to a byte (1.6 bits each)
    ->    [ceil(N / 16), steps, 16, 4]      uint8; a step holds 16 K, or 20 of the dense codes
    ValueError for other bits.
    """
    _check(bits)
    n, k = w.shape
    panels = -(-n // PANEL)
    if bits == 2:
        codes, _, _ = pack_panels((w + 2).astype(np.uint8), np.zeros((n, -(-k // BLOCK))), bits=2, block_size=BLOCK)
        return codes.reshape(panels, -1, PANEL, 4)
    digits = np.ones((panels * PANEL, -(-k // 40) * 2, TRITS, 4), np.uint16)
    digits.reshape(panels * PANEL, -1)[:n, :k] = w + 1
    value = (digits * np.array([81, 27, 9, 3, 1], np.uint16)[:, None]).sum(2, dtype=np.uint16)
    codes = (value * 256 + 242) // 243
    return np.ascontiguousarray(codes.astype(np.uint8).reshape(panels, PANEL, -1, 4).transpose(0, 2, 1, 3))


def unpack_ternary(codes: np.ndarray, *, bits: int = 2, K: int, N: int) -> np.ndarray:
    """The weights [N, K] int8.

    2 bits: codes w + 2 in the panels of matmul_nbits, byte 4 * output + j of step s holding those of k = 16 * s + 4 * j ... + 3, low bits
    first. Dense: digits w + 1 in base 3, the first the highest, of k = 20 * s + j, 20 * s + j + 4 ... + 16; the byte is that number
    times 256 / 243, rounded up (as in ggml's tq1_0), so that a digit is what three times the byte carries into the next.
    """
    _check(bits)
    panels = codes.shape[0]
    if bits == 2:
        blocks = codes.reshape(panels, -1, BLOCK // 16, PANEL, 4)
        ones = np.ones((panels, blocks.shape[1], PANEL), np.float16)
        return unpack_panels(blocks, ones, bits=2, block_size=BLOCK, K=K, N=N).astype(np.int8)
    left, digits = codes.transpose(0, 2, 1, 3).astype(np.uint16), []
    for _ in range(TRITS):
        digits.append(left * 3 >> 8)
        left = left * 3 & 255
    return (np.stack(digits, 3).reshape(panels * PANEL, -1)[:N, :K].astype(np.int8) - 1).astype(np.int8)


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
    if bits not in (1, 2):
        raise ValueError(f"ternary weights are stored in 2 bits, or in 1.6 (which bits=1 stands for), got {bits}")
