import numpy as np

from edgeattn.page_formats import PAGE
from edgeattn.reference.score_excess import rounded

QUERIES = 64  # tokens of a block of queries


def antidiagonal_weights(q, k, mean, *, scale, stride):
    """Softmax weight of each page for each block of queries, estimated from the antidiagonals of strides of tokens (XAttention).

    q     [heads, n, head_dim]        float32, rotated; the newest n tokens
    k     [kv_heads, m, head_dim]     float32, rotated, the queries' own tokens among them
    mean  [kv_heads, head_dim]        float32, taken from keys before they are rounded: any will do, the softmax does not see it
    ->    [heads, query blocks, pages] float32, sums over a block's rows and a page's strides; they add up to the block's rows

    Queries and keys are integers from -127 to 127 with one step for each token. A row is a stride of queries, and its score with a stride
    of keys the mean over the pairs (last - t, first + t), times scale; the last row repeats the last query where tokens lack. Where the
    causal mask leaves a part of the pairs, those alone count, and the product is of floats.
    """
    scores = antidiagonals(q, k, mean, stride)
    weights = np.exp((scores - scores.max(2, keepdims=True)) * scale)
    weights /= weights.sum(2, keepdims=True)
    pages = np.add.reduceat(weights, np.arange(0, weights.shape[2], PAGE // stride), 2)
    return np.add.reduceat(pages, np.arange(0, weights.shape[1], QUERIES // stride), 1).astype(np.float32)


def antidiagonals(q, k, mean, stride):
    """[heads, strides of queries, strides of keys] float64: the mean scores, -inf where the mask leaves no pair; all of a row too small by
    what the row's queries score with the mean key."""
    (heads, n, depth), m = q.shape, k.shape[1]
    rows = np.minimum(np.arange(-(-n // stride) * stride), n - 1).reshape(-1, stride)[:, ::-1]
    last, first = rows.max(1) + m - n, rows.min(1) + m - n
    k, mean = (np.repeat(x, heads // len(k), 0) for x in (k, mean))
    padded = np.zeros((heads, -(-m // stride) * stride, depth), np.float32)
    padded[:, :m] = k
    strides = (rounded(padded - mean[:, None], 127).astype(np.float64)).reshape(heads, -1, stride * depth)
    scores = rounded(q, 127).astype(np.float64)[:, rows].reshape(heads, len(rows), -1) @ strides.swapaxes(1, 2) / stride
    scores[:, np.arange(strides.shape[1]) * stride > last[:, None]] = -np.inf
    edge = np.minimum(first[:, None] // stride + np.arange(2), strides.shape[1] - 1)  # strides of keys that a row may see in part
    seen = edge[..., None] * stride + np.arange(stride) <= (rows + m - n)[:, None]
    exact = np.einsum("hrtd,hretd->hret", q[:, rows].astype(np.float64), padded.reshape(heads, -1, stride, depth)[:, edge])
    exact = np.where(seen, exact, 0).sum(3) / np.maximum(seen.sum(2), 1)
    exact -= np.einsum("hrtd,hd->hr", q[:, rows].astype(np.float64), mean)[..., None] / stride
    np.put_along_axis(scores, np.broadcast_to(edge, exact.shape), np.where(seen.any(2), exact, -np.inf), 2)
    return scores
