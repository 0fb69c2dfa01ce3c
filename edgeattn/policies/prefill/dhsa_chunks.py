"""DHSA (arXiv 2510.24606) with dynamic chunks: keys are cut where the text turns, and whole chunks are read, by all heads alike.

A boundary may lie where the mean keys of the four tokens before and the four after differ in direction (all KV heads joined). The strongest
are taken one by one, each ruling out its neighbours up to eight tokens away. A chunk's score with a query block is the product of their
means, of keys and queries also averaged over the heads, times the root of the chunk's length; the best chunks are read until the budget is
full.

The paper trains a small network to tell boundaries; this cosine takes its place, so that nothing is trained. The tokens that every block
reads are a query block's own and the pages before: the paper's newest 128 end with the block's last row and leave the first rows
nothing older. Its last 64 queries, which read everything, are an instruction whose place is not known here.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import EVERY, PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, causal, ends, forced, pool, spread

SIDE = 4    # tokens on either side of a boundary
APART = 8   # tokens around a boundary that holds no other


@dataclass(frozen=True)
class DhsaChunks(PrefillPolicy):
    """
    budget  keys that a block reads, those always read among them
    chunk   mean length of a chunk in tokens, at least
    turn    1 less the cosine that a boundary must pass
    """
    budget: int = 2048
    chunk: int = 16
    turn: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.budget < 1 or self.chunk < 1:
            raise ValueError(f"need budget and chunk >= 1 tokens, got {self.budget=} {self.chunk=}")

    def operators(self):
        sizes = {"budget": min(self.budget, EVERY), "chunk": min(self.chunk, EVERY)}
        return [("choose_by_chunks", {"sink": self.sink, "recent": self.recent, "turn": float(self.turn)} | sizes)]

    def single_keys(self, assets, group):
        return self.budget

    def select(self, q, k, scale, layer=0, assets=None):
        heads, n = q.shape[:2]
        left = right = both = keys = 0
        for head in range(len(k)):
            x = k[head]
            sums = np.cumsum(np.pad(x, ((1, 0), (0, 0))), 0, dtype=np.float64)
            means = sums[SIDE:] - sums[:-SIDE]                               # of SIDE tokens from each on
            left, right = left + np.square(means[:-SIDE]).sum(1), right + np.square(means[SIDE:]).sum(1)
            both, keys = both + (means[:-SIDE] * means[SIDE:]).sum(1), keys + x / np.float32(len(k))
        m = len(keys)
        starts = boundaries(1 - both / np.sqrt(np.maximum(left * right, 1e-30)), self.turn, m // self.chunk, m)
        scores = chunk_scores(pool(q.mean(0), QUERIES), keys, starts)
        mask = fill(scores, starts, spread(forced(n, m, self.sink, self.recent), m), ends(n, m), self.budget)
        whole = np.pad(mask, ((0, 0), (0, -m % PAGE)), constant_values=True).reshape(len(mask), -1, PAGE).all(2) & causal(n, m)
        return self.plan(*(np.broadcast_to(x, (heads, *x.shape)) for x in (whole, mask)), n, m)


def boundaries(scores: np.ndarray, least: float, count: int, m: int) -> np.ndarray:
    """Where chunks begin, ascending, 0 among them. scores[i] is of a boundary before token i + SIDE. The greedy choice by descending score:
    in each round all that beat every neighbour still there are taken, and rule these out."""
    order = np.argsort(-scores, kind="stable")
    rank = np.empty(len(scores) + 2 * APART, np.int64)
    rank[:] = len(scores)                                  # ruled out
    rank[APART:-APART][order] = np.where(scores[order] > least, np.arange(len(scores)), len(scores))
    found = []
    while (rank < len(scores)).any():
        lowest = np.lib.stride_tricks.sliding_window_view(rank, 2 * APART + 1).min(1)
        taken = np.flatnonzero((rank[APART:-APART] == lowest) & (lowest < len(scores)))
        found.append(rank[taken + APART])
        rank[(taken[:, None] + np.arange(2 * APART + 1)).ravel()] = len(scores)
    places = order[np.sort(np.concatenate(found))[:count]] + SIDE if found else np.empty(0, np.int64)
    return np.union1d(places[places < m], [0])


def chunk_scores(q: np.ndarray, k: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """q [query blocks, d], k [m, d] -> [query blocks, chunks]: with the mean key times the root of how many there are."""
    lengths = np.diff(starts, append=len(k))
    return q @ (np.add.reduceat(k, starts, axis=0) / np.sqrt(lengths, dtype=np.float32)[:, None]).T


def fill(scores: np.ndarray, starts: np.ndarray, always: np.ndarray, stops: np.ndarray, budget: int) -> np.ndarray:
    """[query blocks, keys] bool: `always`, then chunk by chunk until a block reads `budget` keys of those before its stop; the last
    chunk in part."""
    m = always.shape[1]
    chunk = np.repeat(np.arange(len(starts)), np.diff(starts, append=m))      # of each key
    free = ~always & (np.arange(m) < stops[:, None])
    order = np.argsort(-scores, 1, kind="stable")
    sizes = np.take_along_axis(np.add.reduceat(free, starts, axis=1, dtype=np.int64), order, 1)
    before = np.empty_like(sizes)
    np.put_along_axis(before, order, np.cumsum(sizes, 1) - sizes, 1)          # free keys in chunks that score higher
    within = np.cumsum(free, 1) - free                                        # free keys before each, less those before its chunk
    within -= within[:, starts][:, chunk]
    always = always & (np.arange(m) < stops[:, None])
    return always | free & (before[:, chunk] + within < (budget - always.sum(1))[:, None])
