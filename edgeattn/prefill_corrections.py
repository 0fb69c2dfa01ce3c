"""What can be put back of the attention that a plan left out, as NumPy in float64: the contract of kernels that correct sparse prefill.

Each takes the (out, lse) of prefill_plan.attend for a chunk's queries, with the q, k, v they came from, and returns the like.
"""
import numpy as np

from edgeattn.page_formats import PAGE
from edgeattn.prefill_plan import QUERIES, PrefillPlan, shape_of


def delta(out: np.ndarray, lse: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, stride: int = QUERIES,
          last: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Delta Attention (arXiv 2505.11254): every `stride`-th query reads all keys, and what that changes of its output is added to the
    `stride` - 1 queries behind it too. The `last` queries all read everything: the paper has the last 128 of a prompt and what is left of
    its length modulo 64, so that a caller gives 0 for every chunk but the last. Here strides begin with the chunk's first query.

    A query that is shifted keeps its sparse lse, for its output is no softmax over anything (it may lie outside the values' hull); the
    others get that of all keys. Costs 1 / stride of dense attention.
    """
    n = q.shape[1]
    whole = max(n - last, 0)
    rows = np.concatenate([np.arange(0, whole, stride), np.arange(whole, n)])
    dense, dense_lse = attend_rows(q, k, v, rows, scale)
    out, lse = out.astype(np.float64), lse.astype(np.float64)
    shifts = dense - out[:, rows]
    out[:, :whole] += shifts[:, np.arange(whole) // stride]
    out[:, rows], lse[:, rows] = dense, dense_lse
    return out, lse


def attend_rows(q: np.ndarray, k: np.ndarray, v: np.ndarray, rows: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Dense causal attention of some of the queries -> (out [heads, rows, head_dim], lse [heads, rows])"""
    heads, (kv_heads, m, _) = len(q), k.shape
    seen = np.arange(m) <= (m - q.shape[1] + rows)[:, None]
    grouped = q[:, rows].astype(np.float64).reshape(kv_heads, -1, q.shape[2])
    scores = (grouped @ k.astype(np.float64).swapaxes(1, 2) * scale).reshape(heads, len(rows), m)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    out = (weights / total).reshape(kv_heads, -1, m) @ v.astype(np.float64)
    return out.reshape(q[:, rows].shape), (np.log(total) + top)[..., 0]


def tail(out: np.ndarray, lse: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, plan: PrefillPlan,
         scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The zeroth-order term of PISA, here made causal: a page that is not read counts as 32 keys, each the page's mean key with its mean
    value, for queries that see all of it. A page of which some keys are read alone (the plan's columns) does not count. Costs 1 / 32 of
    dense attention. By convexity the counted weight is never above the true one.
    """
    heads, kv_heads, n, m = len(q), len(k), q.shape[1], k.shape[1]
    blocks, full = shape_of(n, m)[0], m // PAGE
    left = ~plan.blocks[..., :full]
    if plan.columns is not None:
        left &= ~plan.columns[..., :full * PAGE].reshape(*left.shape, PAGE).any(-1)
    left = np.repeat(left, heads // len(left), 0)
    keys, values = (np.repeat(x.astype(np.float64)[:, :full * PAGE].reshape(kv_heads, full, PAGE, -1).mean(2), heads // kv_heads, 0)
                    for x in (k, v))
    found, sums = np.zeros(q.shape), np.full((heads, n), -np.inf)
    for block in range(blocks):
        rows = slice(block * QUERIES, min((block + 1) * QUERIES, n))
        seen = (np.arange(full) + 1) * PAGE - 1 <= (m - n + np.arange(rows.start, rows.stop))[:, None]
        scores = q[:, rows].astype(np.float64) @ keys.swapaxes(1, 2) * scale + np.log(PAGE)
        scores = np.where(seen & left[:, block, None], scores, -np.inf)
        top = scores.max(-1, keepdims=True, initial=-np.inf)
        weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = weights.sum(-1, keepdims=True)
        found[:, rows] = weights / np.where(total > 0, total, 1) @ values
        sums[:, rows] = (np.log(np.where(total > 0, total, 1)) + np.where(total > 0, top, -np.inf))[..., 0]
    return merge(out, lse, found, sums)


def merge(out: np.ndarray, lse: np.ndarray, other: np.ndarray, other_lse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Attention over two disjoint sets of keys as attention over both; an lse of -inf is a set of none."""
    both = np.logaddexp(lse.astype(np.float64), other_lse)
    return out * np.exp(lse - both)[..., None] + other * np.exp(other_lse - both)[..., None], both
