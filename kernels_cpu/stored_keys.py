"""Keys of a layer where they lie: whole pages of a cache, and floats behind them. Estimates read them page by page, once."""
from dataclasses import dataclass

import numpy as np
from numba import float32, int32, njit

from edgeattn.kernels_cpu import read_pages
from edgeattn.kernels_cpu.float_tiles import transpose
from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_expand import expand_keys
from edgeattn.kernels_cpu.simd import at, load_tile, store_tile
from edgeattn.page_formats import PAGE

# Names of the row of arguments of an operator that reads such keys.
ARGS = ("pools", "entries", "entries.1", "rest", "rest.1")


@dataclass(frozen=True)
class StoredKeys:
    """
    table    [pools, fields] int64: where pages are (page_pool.py)
    entries  [kv_heads, pages] int32: pages that are full
    rest     [kv_heads, tokens, head_dim] float32: the tokens behind them
    """
    table: np.ndarray
    entries: np.ndarray
    rest: np.ndarray

    @staticmethod
    def of(k) -> "StoredKeys":
        """Of arrays, [kv_heads, tokens, head_dim]."""
        k = np.ascontiguousarray(k if isinstance(k, np.ndarray) else np.stack(list(k)), np.float32)
        return StoredKeys(np.zeros((1, 1), np.int64), np.zeros((len(k), 0), np.int32), k)

    def __len__(self) -> int:
        """Tokens."""
        return self.entries.shape[1] * PAGE + self.rest.shape[1]

    def pages(self, first: int, last: int) -> "StoredKeys":
        """The pages first ... last alone."""
        held = self.entries.shape[1]
        rest = self.rest[:, max(0, first - held) * PAGE:max(0, last - held) * PAGE]
        return StoredKeys(self.table, np.ascontiguousarray(self.entries[:, first:last]), np.ascontiguousarray(rest))

    def floats(self, head: int, first: int, last: int) -> np.ndarray:
        """[tokens, head_dim] of a KV head's pages first ... last."""
        part = self.pages(first, last)
        k, _ = read_pages.run(self.table, self.rest.shape[2], part.entries[head])
        return np.concatenate([k.transpose(0, 2, 1).reshape(-1, self.rest.shape[2]), part.rest[head]])

    def mean(self, newest: int) -> np.ndarray:
        """[kv_heads, head_dim]: of the first 64 of the newest tokens, which `rest` must hold: later ones would make the plans of a chunk's
        first queries hang on what comes after them."""
        return self.rest[:, -newest:][:, :64].mean(1)

    def tensors(self) -> dict[str, np.ndarray]:
        return {"pools": self.table, "entries": self.entries, "rest": self.rest}


@njit(nogil=True, error_model="numpy")
def expand_page(pools, entries, pages, rest, tokens, depth, head, page, task, params, out):
    """Keys of page `page` of a KV head as floats [depth][32], zeros where it has no token; -> how many it has. Arguments are addresses and
    counts; task, params: scratch as page_expand.expand_keys wants it."""
    if page < pages:
        expand_keys(pools, depth, task, at(int32, entries)[head * pages + page], out, PAGE, 16, params)
        return PAGE
    first = (page - pages) * PAGE
    count, to, x = min(PAGE, tokens - first), at(float32, out), at(float32, rest)
    for half in range(0, PAGE, 16):
        for c in range(0, depth, 16):
            if half + 16 <= count:
                tile = transpose(load_tile(F, 16, x, (head * tokens + first + half) * depth + c, depth))
                store_tile(to, c * PAGE + half, PAGE, 0, 1, tile)
            else:
                for i in range(16):
                    for t in range(half, half + 16):
                        to[(c + i) * PAGE + t] = x[(head * tokens + first + t) * depth + c + i] if t < count else np.float32(0)
    return count
