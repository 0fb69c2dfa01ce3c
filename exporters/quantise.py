"""Block quantisation: symmetric round-to-nearest codes under a searched float16 scale.

A block's codes reach from -2**(bits - 1) to one less, so the largest weight is put near the end that has one code more: the
scale takes its sign. A few scales around that are tried. With codes c of a block w the best scale is (c.w) / (c.c), which
leaves the error w.w - (c.w)^2 / (c.c); so the candidate with the largest (c.w)^2 / (c.c) wins, and gets that scale.

Measured on models/nano (int4 blocks of 32, 8-bit embedding, 226,000 tokens of books): perplexity +3.2 % and KL 0.037; the
largest weight's own scale +3.6 %, 0.040; codes -7 ... 7 with a search +5.1 %, 0.052. Both signs or more candidates change
nothing; errors weighted by |w|, w^2 or the norm before the matrix, or to a power other than 2, are worse.
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np

# The largest weight's own code, in units of the last code's: what the search tries.
RATIOS = {4: np.linspace(0.85, 1.15, 9, dtype=np.float32), 8: np.ones(1, np.float32)}
CHUNK = 1 << 17  # weights in work at a time: 0.5 MB stay in a core's cache over all candidates


def quantise_blocks(weight: np.ndarray, bits: int, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """
    weight  [N, K]                         float32
    ->  codes   [N, blocks * block_size]   uint8, zero is 2**(bits - 1), which also pads K
        scales  [N, blocks]                float16
    """
    n, k = weight.shape
    blocks = -(-k // block_size)
    if k % block_size:
        weight = np.pad(weight, ((0, 0), (0, blocks * block_size - k)))
    flat = weight.reshape(-1, block_size)
    codes, scales = np.empty(flat.shape, np.uint8), np.empty(len(flat), np.float16)
    step = max(CHUNK // block_size, 1)

    def quantise(start):
        part = slice(start, start + step)
        scales[part] = _search(flat[part], bits)
        codes[part] = _round(flat[part], scales[part].astype(np.float32), bits) + (1 << (bits - 1))
    with ThreadPoolExecutor() as pool:  # NumPy lets go of the interpreter in every pass
        list(pool.map(quantise, range(0, len(flat), step)))
    return codes.reshape(n, -1), scales.reshape(n, blocks)


def _search(w, bits):
    """The best scale of each row of w: [rows] float16."""
    peak = np.maximum(w.max(1), 0)
    trough = np.minimum(w.min(1), 0)
    largest = np.where(peak > -trough, peak, trough)
    best, scales = np.zeros(len(w), np.float32), np.zeros(len(w), np.float16)
    for ratio in RATIOS[bits]:
        c = _round(w, -largest / ((1 << (bits - 1)) * ratio), bits)
        dot, square = np.einsum("ij,ij->i", c, w), np.einsum("ij,ij->i", c, c)
        scale = np.divide(dot, square, out=np.zeros_like(dot), where=square > 0)
        better = dot * scale > best
        best[better], scales[better] = (dot * scale)[better], scale[better]
    return scales


def _round(w, scale, bits):
    """Signed codes of w [rows, block_size] under one scale a row, as float32."""
    zero = 1 << (bits - 1)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    c = w * inverse[:, None]
    np.rint(c, out=c)
    return np.clip(c, -zero, zero - 1, out=c)
