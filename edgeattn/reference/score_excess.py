import numpy as np

from edgeattn.page_formats import PAGE

QUERIES = 64  # tokens of a block of queries


def score_excess(q, k, q_mean, k_mean, limits, *, scale, bits):
    """By how much the estimated scores of a block of queries with a page pass their rows' limits, at most (SALE).

    q       [heads, n, head_dim]       float32, rotated
    k       [kv_heads, m, head_dim]    float32, rotated: every query sees all of them
    q_mean  [heads, head_dim], k_mean [kv_heads, head_dim]: float32, taken away before rounding
    limits  [heads, n]                 float32
    ->      [heads, query blocks, pages] float32: the largest of (estimate - limit) over the block's rows and the page's keys

    The estimate of scale * q . (k - k_mean): (q - q_mean) * scale and k - k_mean are rounded to integers up to 7 (bits 4) or 127 (bits 8)
    to either side, one step for each token; what q_mean scores with k - k_mean is added unrounded.
    """
    (heads, n, _), (kv_heads, m, _), levels = q.shape, k.shape, {4: 7, 8: 127}[bits]
    keys = np.repeat(k - k_mean[:, None], heads // kv_heads, 0)
    scores = rounded((q - q_mean[:, None]) * np.float32(scale), levels).astype(np.float64) @ rounded(keys, levels).swapaxes(1, 2)
    scores += np.einsum("hd,hkd->hk", q_mean.astype(np.float64) * scale, keys)[:, None] - limits[..., None]
    rows = np.maximum.reduceat(scores, np.arange(0, n, QUERIES), 1)
    return np.maximum.reduceat(rows, np.arange(0, m, PAGE), 2).astype(np.float32)


def rounded(x, levels):
    """[..., tokens, head_dim] float32 to multiples of a token's step, the largest `levels` times that."""
    top = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30))
    return np.rint(x * (np.float32(levels) / top)) * (top / np.float32(levels))
