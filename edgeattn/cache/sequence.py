"""What the cache knows about one sequence."""
from dataclasses import dataclass

import numpy as np

from edgeattn.kernels_cpu.selections import SLOTS


@dataclass(eq=False)
class Sequence:
    """One conversation. Each layer's KV heads have page lists of their own: logical page i of a head holds its slots 32 * i and on; all
    pages are full but the last.

    tables        [layers, kv_heads, max_pages]   int32, entries (page_pool.py), RELEASED behind the last page
    counts        [layers, kv_heads]              int32, slots: tokens that the head holds
    sealed        [layers, kv_heads]              int32, the first page from page 1 on that is not quantised
    positions     [layers, kv_heads, slots]       uint16 or int32, where each token stands in the text; None where slot = position
    mass          [planes, layers, kv_heads, slots]   float32, attention received (attention_mass.py), or None
    compensation  [layers, kv_heads, 1 + 2 * head_dim]   float32 (attention_compensation.py), or None
    confidence    [layers, kv_heads]              float32, the largest attention weight of the last decode step, or None
    limits        [layers, kv_heads]              int32, tokens that a head may hold, zeros before the first eviction; None: as planned
    token_ids     [slots]                         int32, where pages are released (release.py); else None, as the next two
    means         [pages, layers, kv_heads, head_dim]   float16, mean keys of released pages
    pinned        [pages]                         bool, rebuilt for the newest prompt
    selection     [groups, kv_heads, 4 + capacity]   int32, what decode steps read (kernels_cpu/selections.py), or None: everything
    index         [layers, kv_heads, max_pages, width]   uint16, of pages, for selections (kernels_cpu/page_index.py), or None
    indexed       [layers, kv_heads]              int32, pages whose index is good, or None
    value_sums    [layers, kv_heads, 2 + head_dim]   float32 (kernels_cpu/attention_thresholds.py), or None
    length        tokens that the sequence has seen
    exact_from    it can be truncated to this length or more; shorter ones are lost to eviction
    mirror        what a device holds of these arrays (device_sequence.py); None where kernels read them here
    """
    tables: np.ndarray
    counts: np.ndarray
    sealed: np.ndarray
    positions: np.ndarray | None = None
    mass: np.ndarray | None = None
    compensation: np.ndarray | None = None
    confidence: np.ndarray | None = None
    limits: np.ndarray | None = None
    token_ids: np.ndarray | None = None
    means: np.ndarray | None = None
    pinned: np.ndarray | None = None
    selection: np.ndarray | None = None
    index: np.ndarray | None = None
    indexed: np.ndarray | None = None
    value_sums: np.ndarray | None = None
    length: int = 0
    exact_from: int = 0
    room: int = 0          # tokens until some head needs another page
    shared: bool = False   # whether pages that would be written may have other holders
    mirror: object | None = None
    answered: bool = False  # whether the next prompt is a new one: tokens were decoded, or forgotten, since the last

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that there are, by name."""
        found = {name: getattr(self, name) for name in ("tables", "counts", "sealed", "positions", "mass", "compensation", "confidence",
                                                     "limits", "token_ids", "means", "pinned", "selection", "index", "indexed",
                                                     "value_sums")}
        return {name: array for name, array in found.items() if array is not None}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def moved(self, head=..., page: int = 0) -> None:
        """Tokens or pages from `page` on have moved, of a KV head (layer, head) or of all: what was selected or indexed there is void."""
        if self.selection is not None:
            self.selection[..., SLOTS] = 0
        if self.indexed is not None:
            self.indexed[head] = np.minimum(self.indexed[head], page)
        if self.value_sums is not None:
            self.value_sums[head] = 0
        if self.mirror is not None:
            self.mirror.void(head, page)

    def rekeyed(self, heads: np.ndarray, pages: np.ndarray) -> None:
        """Keys of heads [layers, kv_heads] bool are others from their page `pages` on: what was indexed there is void."""
        if self.indexed is not None:
            np.minimum(self.indexed, pages, out=self.indexed, where=heads)
            if self.mirror is not None:
                self.mirror.rekeyed(heads, pages)

    def relisted(self, first: int = 0, last: int | None = None) -> None:
        """Entries of the page lists' columns first ... last have changed."""
        if self.mirror is not None:
            self.mirror.relisted(max(first, 0), self.tables.shape[-1] if last is None else last)

    def fetch(self, slots: list[slice] | None = None) -> None:
        """Bring `mass`, `confidence` and `value_sums` up to date where a device writes them; the mass of these slots alone, if any are
        given."""
        if self.mirror is not None:
            self.mirror.fetch(slots)

    def reordered(self, slots: list[slice]) -> None:
        """Tokens in these slots, whose mass was fetched, have changed places."""
        if self.mirror is not None:
            self.mirror.reordered(slots)

    def copy(self) -> "Sequence":
        self.fetch()
        numbers = {name: getattr(self, name) for name in ("length", "exact_from", "room", "shared", "answered")}
        return Sequence(**{name: array.copy() for name, array in self.arrays.items()}, **numbers)
