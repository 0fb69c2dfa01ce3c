"""Block quantisation: symmetric round-to-nearest codes under a searched float16 scale."""
import numpy as np

BITS = {"int4": 4, "int8": 8}
STEPS = {4: 12, 8: 4}  # scales tried on either side of the largest weight's own


def quantise_blocks(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    weight  [N, K]                     float32
    ->  codes   [N, blocks * block_size]   uint8, zero is 2**(bits - 1); the padding of K has the code of zero
        scales  [N, blocks]                float16
    """
    n, k = weight.shape
    blocks = -(-k // block_size)
    w = np.zeros((n, blocks * block_size), np.float32)
    w[:, :k] = weight
    w = w.reshape(n, blocks, block_size)
    zero = 1 << (bits - 1)
    peak = np.take_along_axis(w, np.abs(w).argmax(-1)[..., None], -1)[..., 0]
    best = np.full((n, blocks), np.inf, np.float32)
    scales = np.zeros((n, blocks), np.float16)
    for step in range(-STEPS[bits], STEPS[bits] + 1):  # the largest weight gets the code -zero, the one end that has no partner
        scale = (-peak / np.float32(zero + 0.1 * step)).astype(np.float16)
        error = np.square(_codes(w, scale, zero) * scale.astype(np.float32)[..., None] - w).sum(-1)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, scale, scales)
    codes = _codes(w, scales, zero) + zero
    return codes.astype(np.uint8).reshape(n, -1), scales


def _codes(w, scale, zero):
    wide = scale.astype(np.float32)[..., None]
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    return np.clip(np.rint(w * inverse), -zero, zero - 1)
