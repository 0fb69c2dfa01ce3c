"""DHSA (arXiv 2510.24606) over pages: the same number of pages for every query block, by one of its four ways to rank them.

topk  mean query times mean key
a     the same; the first page and the newest seen count among those chosen
vs    the newest 64 queries' true softmax, summed by key (verticals) and by distance (slashes). The budget in tokens is halved between the
      best of either; a page's score is the weight of the verticals in it and of the slashes that cross it and the query block
vsb   the same of means: of 32 queries and of pages

The paper's query blocks are of 128. It reads the last one in full: chunks end before the prompt does, so ours do not. Pages that a block
cannot see are never ranked, and the queries that `vs` asks are real ones, not padding. `vs` costs as much as those 64 queries' scores.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy, double_bits
from edgeattn.prefill_plan import PAGE, QUERIES, best, causal, ends, pool, shape_of, softmax


@dataclass(frozen=True)
class Dhsa(PrefillPolicy):
    """
    density  pages that a block reads, of all pages so far
    mode     topk, a, vs or vsb
    """
    density: float = 0.125
    mode: str = "topk"

    def __post_init__(self):
        super().__post_init__()
        if self.mode not in ("topk", "a", "vs", "vsb"):
            raise ValueError(f"mode must be topk, a, vs or vsb, got {self.mode!r}")

    def operators(self):
        about = {"sink": self.sink, "recent": self.recent, "density": double_bits(self.density)}
        if self.mode in ("topk", "a"):
            return [("choose_by_ranks", about | {"ends": int(self.mode == "a")})]
        return [("choose_by_crossings", about | {"sampled": QUERIES, "unit": 1 if self.mode == "vs" else PAGE})]

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        allowed = causal(n, m)
        count = max(1, int(self.density * allowed.shape[1]))
        if self.mode in ("topk", "a"):
            scores = pool(q, QUERIES) @ pool(k, PAGE).T
            if self.mode == "a":
                scores[..., 0] = np.inf
                scores[:, np.arange(len(allowed)), allowed.sum(1) - 1] = np.inf
        elif self.mode == "vs":
            scores = vertical_slash(q[:, -QUERIES:], k, np.arange(max(0, n - QUERIES), n) + m - n, scale, count * PAGE, n, m)
        else:
            recent = pool(q[:, -QUERIES:], PAGE)
            last = np.minimum(np.arange(max(0, n - QUERIES) + PAGE, n + PAGE, PAGE), n) + m - n - 1
            scores = vertical_slash(recent, pool(k, PAGE), last // PAGE, scale, count, n, m)
        return best(scores, np.broadcast_to(allowed, scores.shape), count)


def vertical_slash(q: np.ndarray, k: np.ndarray, places: np.ndarray, scale: float, budget: int, n: int, m: int) -> np.ndarray:
    """Scores of pages from a few queries' weights on units, keys or pages, of which row r sees those up to places[r].
    q [group, rows, d], k [units, d], budget in units -> [group, query blocks, pages]"""
    units = len(k)
    unit = 1 if units == m else PAGE
    weights = softmax(np.where(np.arange(units) <= places[:, None], q @ k.T * scale, -np.inf))
    slashes = np.zeros((len(q), units), np.float32)       # by distance
    for row, place in enumerate(places):
        slashes[:, :place + 1] += weights[:, row, place::-1]
    verticals, slashes = (np.where(best(x, np.ones(x.shape, bool), -(-budget // 2)), x, 0) for x in (weights.sum(1), slashes))
    inside = np.add.reduceat(verticals, np.arange(0, units, PAGE // unit), 1)
    # distances from the first query to a page's last key, up to those from the last query to its first
    pages, first = np.arange(inside.shape[1]) * PAGE, m - n + np.arange(shape_of(n, m)[0]) * QUERIES
    near = np.clip(first[:, None] // unit - (pages + PAGE - 1) // unit, 0, units)
    far = np.clip((ends(n, m)[:, None] - 1) // unit - pages // unit + 1, 0, units)
    sums = np.pad(np.cumsum(slashes, 1), ((0, 0), (1, 0)))
    return inside[:, None] + sums[:, far] - sums[:, near]
