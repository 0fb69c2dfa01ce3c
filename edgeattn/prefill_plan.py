"""What a block of queries reads while a prompt is being read: plans of key blocks and single keys, and the arithmetic that makes them.

Queries stand in blocks of QUERIES tokens, keys in pages of PAGE. The queries are the newest tokens: query i of n stands at key m - n + i
of m. A plan is made of bool arrays over [query heads, query blocks, ...], so that methods compose by `|` and `&`.
"""
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edgeattn.page_formats import PAGE

QUERIES = 64  # tokens of a block of queries


@dataclass(frozen=True)
class PrefillPlan:
    """
    blocks   [heads, query blocks, pages] bool: pages that are read
    columns  [heads, query blocks, keys] bool, or None: keys that are read alone, outside these pages
    queries, keys  how many there are
    """
    blocks: np.ndarray
    columns: np.ndarray | None
    queries: int
    keys: int

    def union(self, kv_heads: int) -> "PrefillPlan":
        """What the kernels read: a page serves all query heads of its KV head. -> blocks [kv_heads, ...], columns [kv_heads, ...]"""
        blocks, columns = (None if x is None else x.reshape(kv_heads, -1, *x.shape[1:]).any(1) for x in (self.blocks, self.columns))
        if columns is not None:
            columns = columns & ~spread(blocks, self.keys)
        return PrefillPlan(blocks, columns, self.queries, self.keys)

    def mask(self) -> np.ndarray:
        """[heads, queries, keys] bool: what each query sees."""
        seen = spread(self.blocks, self.keys)
        seen = seen if self.columns is None else seen | self.columns
        rows = np.repeat(seen, QUERIES, 1)[:, :self.queries]
        return rows & (np.arange(self.keys) <= np.arange(self.queries)[:, None] + self.keys - self.queries)

    def density(self) -> float:
        """The share of pairs that are read."""
        read, every = self.pairs()
        return read / every

    def pairs(self) -> tuple[int, int]:
        """Of query and key, over all heads: how many are read, and how many a causal mask leaves."""
        past = self.keys - self.queries
        last = past + np.arange(1, self.queries + 1)                       # keys that a query sees
        starts = np.arange(self.blocks.shape[2]) * PAGE
        seen = np.clip(last[:, None] - starts, 0, PAGE)                    # of each page
        seen = np.add.reduceat(seen, np.arange(0, self.queries, QUERIES))  # by query block
        found = (self.blocks * seen).sum()
        if self.columns is not None:
            later = np.clip(last[:, None] - np.arange(self.keys), 0, 1)
            found += ((self.columns & ~spread(self.blocks, self.keys)) * np.add.reduceat(later, np.arange(0, self.queries, QUERIES))).sum()
        return int(found), int(len(self.blocks) * last.sum())


def spread(blocks: np.ndarray, keys: int) -> np.ndarray:
    """[..., pages] as [..., keys]."""
    return np.repeat(blocks, PAGE, -1)[..., :keys]


def shape_of(queries: int, keys: int) -> tuple[int, int]:
    """(query blocks, pages)"""
    return -(-queries // QUERIES), -(-keys // PAGE)


def ends(queries: int, keys: int) -> np.ndarray:
    """[query blocks]: the key behind the last one that a block's last query sees."""
    blocks = np.arange(1, shape_of(queries, keys)[0] + 1)
    return keys - queries + np.minimum(blocks * QUERIES, queries)


def causal(queries: int, keys: int) -> np.ndarray:
    """[query blocks, pages] bool: pages of which a block's last query sees something."""
    return np.arange(shape_of(queries, keys)[1]) * PAGE < ends(queries, keys)[:, None]


def forced(queries: int, keys: int, sink: int = 1, recent: int = 0) -> np.ndarray:
    """[query blocks, pages] bool: the first `sink` pages, every page that a block's own tokens stand in, and `recent` before these."""
    pages, first = np.arange(shape_of(queries, keys)[1]), keys - queries + np.arange(shape_of(queries, keys)[0]) * QUERIES
    return ((pages < sink) | (pages >= (first // PAGE - recent)[:, None])) & causal(queries, keys)


def pool(x: np.ndarray, size: int) -> np.ndarray:
    """Means of `size` rows: [..., rows, d] -> [..., blocks, d]; of the last block over the rows that it has."""
    starts = np.arange(0, x.shape[-2], size)
    counts = np.minimum(size, x.shape[-2] - starts).astype(np.float32)
    return np.add.reduceat(x, starts, axis=-2) / counts[:, None]


class LayerKeys:
    """The keys of a layer's KV heads, [tokens, head_dim] float32 of a head when it is asked for: of plain arrays here; a cache has its own
    (prefill_scheduler.py)."""

    def __init__(self, keys):
        self._keys = keys
        self.tokens = len(keys[0])

    @classmethod
    def of(cls, keys) -> "LayerKeys":
        """keys: [kv_heads, tokens, head_dim], an array of each head, or already what is wanted."""
        return keys if isinstance(keys, cls) else cls(keys)

    def __len__(self):
        return len(self._keys)

    def __getitem__(self, head: int) -> np.ndarray:
        return self._keys[head]

    @cached_property
    def means(self) -> np.ndarray:
        """[kv_heads, pages, head_dim]: of each page."""
        return np.stack([pool(keys, PAGE) for keys in self._keys])

    def stored(self):
        """StoredKeys, as operators that estimate take them."""
        from edgeattn.kernels_cpu.stored_keys import StoredKeys
        return StoredKeys.of(self._keys)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis; a row of nothing but -inf becomes zeros."""
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    total = weights.sum(-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def best(scores: np.ndarray, allowed: np.ndarray, count) -> np.ndarray:
    """The `count` allowed places of each row (an int, or an array of the rows' shape) that score highest; of equals the earlier."""
    order = np.argsort(np.where(allowed, -scores, np.inf), -1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.broadcast_to(np.arange(scores.shape[-1]), order.shape), -1)
    return (ranks < np.asarray(count)[..., None]) & allowed


def cover(weights: np.ndarray, allowed: np.ndarray, part, kept: np.ndarray | None = None) -> np.ndarray:
    """The fewest allowed places of each row whose weights sum to `part` (from 0 to 1) of all allowed ones'; those in `kept` come first. All
    of them at part 1, whatever rounding makes of the sum."""
    weights, part = np.where(allowed, weights, 0), np.asarray(part)[..., None]
    first = np.zeros(weights.shape, bool) if kept is None else kept & allowed
    rest = np.where(allowed & ~first, weights, -1)
    ordered = -np.sort(-rest, -1)  # values alone: NumPy sorts them several times as fast as it sorts places
    before = np.cumsum(np.maximum(ordered, 0), -1)
    before = np.concatenate([np.zeros_like(before[..., :1]), before[..., :-1]], -1) + np.where(first, weights, 0).sum(-1, keepdims=True)
    count = ((before < part * weights.sum(-1, keepdims=True)) & (ordered >= 0)).sum(-1, keepdims=True)
    least = np.where(count > 0, np.take_along_axis(ordered, np.maximum(count - 1, 0), -1), np.inf)
    found, equal = rest > least, rest == least
    found |= equal & (np.cumsum(equal, -1) <= count - found.sum(-1, keepdims=True))
    return (found | first | (part >= 1)) & allowed


def partial_softmax(q: np.ndarray, k: np.ndarray, scale: float, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each row's softmax over the pages of `blocks` [query blocks, pages] stands on: the greatest score, and the sum of the
    exponentials of all less that one. Every row must see a key there. q [group, n, d], k [m, d] -> two of [group, n]"""
    (group, n, depth), m = q.shape, len(k)
    top, total = np.empty((2, group, n), np.float32)
    for block, pages in enumerate(blocks):
        rows = np.arange(block * QUERIES, min((block + 1) * QUERIES, n))
        keys, places = np.flatnonzero(spread(pages, m)), rows + m - n
        scores = ((q[:, rows] * np.float32(scale)).reshape(-1, depth) @ k[keys].T).reshape(group, len(rows), -1)
        later = np.searchsorted(keys, places[0] + 1)  # from there on some row does not see a key
        scores[..., later:][:, keys[later:] > places[:, None]] = -np.inf
        top[:, rows] = scores.max(-1)
        scores -= top[:, rows, None]
        total[:, rows] = np.exp(scores, out=scores).sum(-1)
    return top, total


def true_weights(q: np.ndarray, k: np.ndarray, rows: np.ndarray, scale: float) -> np.ndarray:
    """[heads, len(rows), m]: the softmax weights of the queries `rows` over all keys, what the methods that sample queries look at."""
    past = len(k) - q.shape[1]
    scores = ((q[:, rows] * np.float32(scale)).reshape(-1, q.shape[2]) @ k.T).reshape(len(q), len(rows), -1)
    scores[..., past:][:, np.arange(q.shape[1]) > rows[:, None]] = -np.inf
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores


def by_distance(weights: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Sums along diagonals: weights [heads, rows, m] of queries that stand at `positions` -> [heads, m], by how far a key lies behind."""
    found = np.zeros((len(weights), weights.shape[2]), np.float32)
    for row, position in enumerate(positions):
        found[:, :position + 1] += weights[:, row, position::-1]
    return found


def slash_pages(slashes: np.ndarray, queries: int, keys: int) -> np.ndarray:
    """[heads, query blocks, pages] bool: pages that some query of a block comes to by one of the distances `slashes` [heads, m] bool."""
    count, pages = shape_of(queries, keys)
    first, starts = keys - queries + np.arange(count)[:, None] * QUERIES, np.arange(pages) * PAGE
    nearer = np.concatenate([np.zeros((len(slashes), 1), np.int64), np.cumsum(slashes, 1)], 1)  # slashes nearer than a distance
    least, most = (np.clip(x, 0, keys) for x in (first - starts - PAGE + 1, ends(queries, keys)[:, None] - starts))
    return nearer[:, most] > nearer[:, least]


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, plan: PrefillPlan, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Attention over what a plan keeps, in float64: the contract of the kernels. q [heads, n, d], k, v [kv_heads, m, d]; the plan's blocks
    may be of query heads or of KV heads. -> (out [heads, n, d], log of the sum of exponentials [heads, n])"""
    heads, kv_heads = len(q), len(k)
    mask = plan.mask()
    mask = np.repeat(mask, heads // len(mask), 0)
    k, v = (np.repeat(x.astype(np.float64), heads // kv_heads, 0) for x in (k, v))
    scores = np.where(mask, np.einsum("hqd,hkd->hqk", q.astype(np.float64), k) * scale, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("hqk,hkd->hqd", weights, v) / total, (np.log(total) + top)[..., 0]


def recall(q: np.ndarray, k: np.ndarray, plan: PrefillPlan, scale: float) -> np.ndarray:
    """[heads, n]: the part of each query's dense softmax weight that lies on what the plan keeps; the mean and the least of them (CRA of
    SampleAttention, arXiv 2406.15486) are what plans are compared by."""
    dense = PrefillPlan(np.ones_like(plan.blocks), None, plan.queries, plan.keys)
    return np.exp(attend(q, k, k, plan, scale)[1] - attend(q, k, k, dense, scale)[1])
