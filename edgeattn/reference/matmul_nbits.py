"""Block-quantised weights in panels of 16 outputs; see `unpack_panels` for the layout."""
import numpy as np

from edgeattn.ops import PANEL


def pack_panels(q, scales, zero_points=None, *, bits, block_size):
    """Codes in natural order to the stored layout. Outputs and K are padded with the code of zero.

    q            [N, K]        uint8, 0 ... 2**bits - 1
    scales       [N, blocks]   float, blocks = ceil(K / block_size)
    zero_points  [N, blocks]   uint8, optional; absent means 2**(bits - 1)
    ->  codes        [N / 16, blocks, block_size * bits / 32, 16, 4]  uint8
        scales       [N / 16, blocks, 16]                             float16
        zero_points  [N / 16, blocks, 16]                             uint8, or None
    """
    n, k = q.shape
    blocks, panels, zero = scales.shape[1], -(-n // PANEL), 1 << (bits - 1)
    padded = np.full((panels * PANEL, blocks * block_size), zero, np.uint8)
    padded[:n, :k] = q
    if zero_points is not None:  # padding must decode to zero under the block's own zero point
        tail = np.repeat(zero_points, block_size, axis=1)
        padded[:n, k:] = tail[:, k:]
    if bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << 4)
    codes = padded.reshape(panels, PANEL, blocks, -1, 4).transpose(0, 2, 3, 1, 4)

    def by_panel(x, dtype, fill):
        full = np.full((panels * PANEL, blocks), fill, dtype)
        full[:n] = x
        return np.ascontiguousarray(full.reshape(panels, PANEL, blocks).transpose(0, 2, 1))
    return (np.ascontiguousarray(codes), by_panel(scales, np.float16, 0),
            None if zero_points is None else by_panel(zero_points, np.uint8, zero))


def unpack_panels(codes, scales, zero_points=None, *, bits, block_size, K, N):
    """The weights [N, K] float32 that the panels stand for.

    Per panel of 16 outputs and block of `block_size` K there are steps of 64 bytes: byte 4 * output + j of step s is byte
    4 * s + j of that output's block in MatMulNBits order. 4 bits: that byte holds k = 2 * (4 * s + j) in its low nibble and
    the next k in its high one; 8 bits: k = 4 * s + j. So the panels are a transpose of MatMulNBits' B, byte by byte.
    """
    panels, blocks = codes.shape[:2]
    rows = codes.transpose(0, 3, 1, 2, 4).reshape(panels * PANEL, blocks, -1)
    q = np.stack([rows & 15, rows >> 4], -1).reshape(*rows.shape[:2], -1) if bits == 4 else rows

    def by_output(x):
        return x.transpose(0, 2, 1).reshape(panels * PANEL, blocks, 1).astype(np.float32)
    zero = np.float32(1 << (bits - 1)) if zero_points is None else by_output(zero_points)
    return ((q.astype(np.float32) - zero) * by_output(scales)).reshape(panels * PANEL, -1)[:N, :K]


def matmul_nbits(x, codes, scales, zero_points=None, bias=None, *, bits, block_size, K, N):
    """x times block-quantised weights, transposed: exact arithmetic on the stored weights (ONNX Runtime's MatMulNBits).

    x            [tokens, K]                                          float32
    codes        [panels, blocks, block_size * bits / 32, 16, 4]      uint8; see unpack_panels
    scales       [panels, blocks, 16]                                 float16
    zero_points  [panels, blocks, 16]                                 uint8, optional; absent means 2**(bits - 1)
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
