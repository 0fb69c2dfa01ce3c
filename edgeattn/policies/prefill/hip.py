"""HiP (arXiv 2406.09827) with the stages of InfiniteHiP (arXiv 2502.08910): pages are found by searching a tree of ranges of pages.

All pages before a query block are split into at most `beam` equal ranges. Each is halved and a half scored by the largest product of one
key in its middle with one of the block's queries; the best `beam` halves go on, until they are pages. Of these the `keep` best are read,
by several keys each. The first `sink` and the nearest `recent` pages are always read. The authors read the first layers whole, which is
not a matter of this method. Representatives miss a needle that stands alone.
"""
from dataclasses import dataclass

import numpy as np

from edgeattn.policies.prefill import PrefillPolicy
from edgeattn.prefill_plan import PAGE, QUERIES, best, shape_of

WIDEST = 2048  # beam of which a block of a GPU holds all ranges


@dataclass(frozen=True)
class Hip(PrefillPolicy):
    """keep    pages that are read besides the forced ones (2,048 tokens)
    beam    ranges that go on in each round (8,192 tokens of pages)
    stride  of the queries that are looked at
    step    of a page's keys that the last round looks at
    """
    keep: int = 64
    beam: int = 256
    stride: int = 4
    step: int = 8
    sink: int = 8
    recent: int = 32

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.keep <= self.beam or self.stride < 1 or not 1 <= self.step <= PAGE:
            raise ValueError(f"need 1 <= keep <= beam, stride >= 1 and step 1 to {PAGE}, "
                             f"got {self.keep=} {self.beam=} {self.stride=} {self.step=}")

    def operators(self):
        about = {name: getattr(self, name) for name in ("sink", "recent", "keep", "beam", "step")} | {"stride": min(self.stride, QUERIES)}
        return [("choose_by_search", about)] if self.beam <= WIDEST else []

    def choose(self, q, k, scale, layer, head, assets):
        n, m = q.shape[1], len(k)
        count, pages = shape_of(n, m)
        limit = ((m - n + np.arange(count) * QUERIES) // PAGE)[:, None]  # pages before a block's own
        rows = np.minimum(np.arange(count)[:, None] * QUERIES + np.arange(0, QUERIES, self.stride), n - 1)
        queries, size = q[:, rows], 1                                    # [group, query blocks, rows, head_dim]
        while size * self.beam < pages:
            size *= 2
        starts = np.arange(0, pages, size)                               # first pages of the ranges
        nodes, blocks = np.broadcast_to(starts, (len(q), count, len(starts))), np.zeros((len(q), count, pages + size), bool)
        while size > 1:
            size //= 2
            nodes = np.concatenate([nodes, nodes + size], -1)
            middles = (nodes + np.minimum(nodes + size, limit)) * PAGE // 2
            nodes = self._best(nodes, self._scores(queries, k, middles[..., None]), nodes < limit, self.beam)
        keys = nodes[..., None] * PAGE + np.arange(self.step // 2, PAGE, self.step)
        scores = self._scores(queries, k, keys)
        chosen = best(scores, nodes < limit, np.full(nodes.shape[:2], self.keep))
        np.put_along_axis(blocks, nodes, chosen, 2)
        return blocks[..., :pages]

    def _scores(self, queries, k, keys):
        """[..., nodes]: the most that one of a block's queries and one of a node's keys [..., nodes, keys] make."""
        keys = np.minimum(keys, len(k) - 1)
        found = queries @ k[keys.reshape(*keys.shape[:2], -1)].swapaxes(-1, -2)
        return found.max(2).reshape(keys.shape).max(-1)

    def _best(self, nodes, scores, allowed, count):
        """The `count` best nodes of each row, those that are not allowed last."""
        order = np.argsort(np.where(allowed, -scores, np.inf), -1, kind="stable")[..., :count]
        return np.take_along_axis(nodes, order, -1)
