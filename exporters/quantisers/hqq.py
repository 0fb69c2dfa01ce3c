"""HQQ, half-quadratic quantisation (Badri and Shaji 2023): no text needed; the zero point is fitted under a norm that forgives outliers.

min over z of ||w - s (q - z)||_p with p = 0.7, split into e = shrink(w - w_q) and z = mean(q - (w - e) / s) in turns, with a penalty
beta that grows. The scale spans the block; zero points are float16.
"""
import numpy as np

NEEDS_STATISTICS = False
ZERO_POINTS = "float16"
P, BETA, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20


def quantise(weight, bits, block_size, statistics=None):
    n, k = weight.shape
    blocks, top = -(-k // block_size), (1 << bits) - 1
    if k % block_size:
        weight = np.pad(weight, ((0, 0), (0, blocks * block_size - k)), mode="edge")
    w = weight.reshape(-1, block_size)
    low, high = np.minimum(w.min(1, keepdims=True), 0), np.maximum(w.max(1, keepdims=True), 0)  # zero points stay in range
    scale = np.maximum((high - low) / top, 1e-7).astype(np.float16).astype(np.float32)
    zero, best = -low / scale, np.full((len(w), 1), np.inf, np.float32)
    kept = zero.copy()
    beta = BETA
    for _ in range(ROUNDS):
        q = np.clip(np.rint(w / scale + zero), 0, top)
        error = w - (q - zero) * scale
        loss = (np.abs(error) ** P).mean(1, keepdims=True)
        better = loss < best
        kept, best = np.where(better, zero, kept), np.minimum(loss, best)
        magnitude = np.abs(error)
        shrunk = np.sign(error) * np.maximum(magnitude - np.maximum(magnitude, 1e-8) ** (P - 1) / beta, 0)
        zero = (q - (w - shrunk) / scale).mean(1, keepdims=True)
        beta *= GROWTH
    kept = kept.astype(np.float16)
    codes = np.clip(np.rint(w / scale + kept.astype(np.float32)), 0, top).astype(np.uint8)
    return codes.reshape(n, -1), scale.astype(np.float16).reshape(n, blocks), kept.reshape(n, blocks)
