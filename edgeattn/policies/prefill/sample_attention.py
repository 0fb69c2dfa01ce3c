"""SampleAttention (arXiv 2406.15486): true weights of a few queries, summed by key and by distance, say what all queries read.

The last `rows` queries of each `segment` are sampled, about 5% of all as in the paper, but in every block: what is sampled at the end of
a chunk alone misses what its other blocks ask for. Keys and distances go in groups of a page (the paper has 128), a distance's weight
being the mean over the samples that reach so far. The two parts bound what each covers of the sampled weight, not what the merged plan
loses of other queries.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, by_distance, cover, shape_of, slash_pages, spread, true_weights


@dataclass(frozen=True)
class SampleAttention(PrefillPolicy):
    """columns, slashes  part of the sampled weight that pages of keys, and bands of distances, have to cover
    segment, rows     queries, and how many of them are sampled
    """
    columns: float = 0.95
    slashes: float = 0.95
    segment: int = 64
    rows: int = 4
    recent: int = 4

    def __post_init__(self):
        super().__post_init__()
        if self.segment < 1 or self.rows < 1:
            raise ValueError(f"need a segment and rows of at least 1 query, got {self.segment=} {self.rows=}")

    def operators(self):
        if self.segment < QUERIES or self.rows > self.segment:
            return []
        return [("choose_by_samples", {"sink": self.sink, "recent": self.recent, "sampled": self.rows, "apart": 1, "segment": self.segment,
                                       "part_down": float(self.columns), "part_across": float(self.slashes), "fewest": 0, "below": 0.0})]

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        stops = np.append(np.arange(self.segment, n, self.segment), n)
        rows = np.unique(np.maximum(stops[:, None] - 1 - np.arange(self.rows), 0))
        weights, positions = true_weights(q, k, rows, scale), m - n + rows
        reach = len(rows) - np.searchsorted(positions, np.arange(m))  # samples that have a key so far behind
        by_slash, starts = by_distance(weights, positions) / np.maximum(reach, 1), np.arange(0, m, PAGE)
        pages, bands = (np.add.reduceat(x, starts, 1) for x in (weights.sum(1), by_slash))
        allowed = np.ones(shape_of(n, m)[1], bool)
        return cover(pages, allowed, self.columns)[:, None] | slash_pages(spread(cover(bands, allowed, self.slashes), m), n, m)
