"""Block-quantised weights in panels of 16 outputs; see `unpack_panels` for the layout."""
import numpy as np

from edgeattn.ops import PANEL


def pack_panels(q, scales, zero_points=None, *, bits, block_size):
    """Codes in natural order to the stored layout. Outputs and K are padded with the code of zero.

    q            [N, K]        uint8, 0 ... 2**bits - 1; bits is 2, 3, 4 or 8
    scales       [N, blocks]   float, blocks = ceil(K / block_size)
    zero_points  [N, blocks]   uint8, or float (stored as float16), optional; absent means 2**(bits - 1)
    ->  codes        [N / 16, blocks, block_size * bits / 32, 16, 4]  uint8
        scales       [N / 16, blocks, 16]                             float16
        zero_points  [N / 16, blocks, 16]                             uint8 or float16, or None
    ValueError for other bits, and for 3 bits in blocks of 16.
    """
    if bits not in (2, 3, 4, 8):
        raise ValueError(f"block-quantised weights have 2, 3, 4 or 8 bits, got {bits}")
    if bits == 3 and block_size < 32:
        raise ValueError(f"3-bit weights need blocks of 32 or more, got {block_size}; use 2 or 4 bits for smaller ones")
    n, k = q.shape
    blocks, panels, zero = scales.shape[1], -(-n // PANEL), 1 << (bits - 1)
    padded = np.full((panels * PANEL, blocks * block_size), zero, np.uint8)
    padded[:n, :k] = q
    if zero_points is not None and k % block_size:  # padding must decode to zero under the block's own zero point, if that is whole
        padded[:n, k:] = np.clip(np.rint(zero_points[:, -1:]), 0, (1 << bits) - 1)
    stored = _pack_bits(padded.reshape(panels * PANEL, blocks, block_size), bits)
    codes = stored.reshape(panels, PANEL, blocks, -1, 4).transpose(0, 2, 3, 1, 4)

    def by_panel(x, dtype, fill):
        full = np.full((panels * PANEL, blocks), fill, dtype)
        full[:n] = x
        return np.ascontiguousarray(full.reshape(panels, PANEL, blocks).transpose(0, 2, 1))
    zero_type = None if zero_points is None else np.uint8 if zero_points.dtype.kind in "ui" else np.float16
    return (np.ascontiguousarray(codes), by_panel(scales, np.float16, 0),
            None if zero_points is None else by_panel(zero_points, zero_type, zero))


def unpack_panels(codes, scales, zero_points=None, *, bits, block_size, K, N):
    """The weights [N, K] float32 that the panels stand for.

    Per panel of 16 outputs and block of `block_size` K there are steps of 64 bytes: byte 4 * output + j of step s is byte
    4 * s + j of that output's block. 2, 4 and 8 bits: MatMulNBits' order, so that the panels are a transpose of its B, byte by byte:
    neighbours of K share a byte, low bits first (4 bits: k = 2 * (4 * s + j) in the low nibble and the next k in the high one).
    3 bits: the low two bits of all codes as for 2 bits, in block_size / 16 steps; then the third bits, in block_size / 32 steps, bit
    c + 4 * h of byte 4 * t + j being that of k = 32 * t + 16 * h + 4 * j + c.
    """
    panels, blocks = codes.shape[:2]
    rows = codes.transpose(0, 3, 1, 2, 4).reshape(panels * PANEL, blocks, -1)
    q = _unpack_bits(rows, bits)

    def by_output(x):
        return x.transpose(0, 2, 1).reshape(panels * PANEL, blocks, 1).astype(np.float32)
    zero = np.float32(1 << (bits - 1)) if zero_points is None else by_output(zero_points)
    return ((q.astype(np.float32) - zero) * by_output(scales)).reshape(panels * PANEL, -1)[:N, :K]


def _pack_bits(q, bits):
    """Codes [outputs, blocks, block_size] to the bytes of their blocks."""
    if bits == 8:
        return q
    if bits != 3:
        parts = [q[..., i::8 // bits] << (bits * i) for i in range(8 // bits)]
        return np.bitwise_or.reduce(parts)
    third = (q >> 2).reshape(*q.shape[:2], -1, 2, 4, 4).transpose(0, 1, 2, 4, 3, 5)  # t, j, h, c
    high = np.packbits(third.reshape(*q.shape[:2], -1), axis=-1, bitorder="little")
    return np.concatenate([_pack_bits(q & 3, 2), high], axis=-1)


def _unpack_bits(rows, bits):
    """The inverse of _pack_bits."""
    if bits == 8:
        return rows
    if bits != 3:
        parts = [rows >> shift & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return np.stack(parts, -1).reshape(*rows.shape[:2], -1)
    low, high = np.split(rows, [rows.shape[-1] * 2 // 3], axis=-1)
    third = np.unpackbits(high, axis=-1, bitorder="little").reshape(*rows.shape[:2], -1, 4, 2, 4).transpose(0, 1, 2, 4, 3, 5)
    return _unpack_bits(low, 2) | third.reshape(*rows.shape[:2], -1) << 2


def matmul_nbits(x, codes, scales, zero_points=None, bias=None, *, bits, block_size, K, N):
    """x times block-quantised weights, transposed: exact arithmetic on the stored weights (ONNX Runtime's MatMulNBits).

    x            [tokens, K]                                          float32
    codes        [panels, blocks, block_size * bits / 32, 16, 4]      uint8; see unpack_panels
    scales       [panels, blocks, 16]                                 float16
    zero_points  [panels, blocks, 16]                                 uint8 or float16, optional; absent means 2**(bits - 1)
    bias         [N]                                                  float32, optional
    ->           [tokens, N]                                          float32
    Kernels may quantise x to int8 per token and block (MatMulNBits' accuracy_level=4): compare with `quantise_activations`.
    """
    weight = unpack_panels(codes, scales, zero_points, bits=bits, block_size=block_size, K=K, N=N)
    out = x.astype(np.float64) @ weight.astype(np.float64).T
    return (out if bias is None else out + bias).astype(np.float32)


def quantise_activations(x, block_size):
    """x [tokens, K] rounded to int8 per token and block of K, and back: float32."""
    tokens, k = x.shape
    padded = np.zeros((tokens, -(-k // block_size), block_size), np.float32)
    padded.reshape(tokens, -1)[:, :k] = x
    scale = np.maximum(np.abs(padded).max(-1, keepdims=True), np.float32(1e-20)) / np.float32(127)
    return (np.rint(padded / scale) * scale).reshape(tokens, -1)[:, :k].astype(np.float32)
