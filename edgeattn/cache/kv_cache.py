"""The paged KV cache: storage, page tables per sequence, copy-on-write sharing."""
import weakref
from dataclasses import dataclass, field

import numpy as np

from edgeattn.cache.pages import CacheFull, PagePool
from edgeattn.kernels_cpu.steps import aligned

KV_TYPES = {"f32": np.float32, "f16": np.uint16}  # halves are kept as bits: Numba has no float16 arrays
PAGE_SIZE = 32


@dataclass(eq=False)
class Sequence:
    """One conversation: logical page i holds tokens i * page_size and on, in physical page `pages[i]`."""
    pages: list[int] = field(default_factory=list)
    length: int = 0


class KVCache:
    """Keys and values of all layers in pages of `page_size` tokens.

    k  [layers, pages, kv_heads, head_dim, page_size]   keys after rotary; channel-major, so that a score is a sum of vectors of tokens
    v  [layers, pages, kv_heads, page_size, head_dim]
    kv_type "f32", or "f16" (stored as uint16 bits). Memory is touched only as pages are used.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, tokens: int, kv_type: str = "f16", page_size: int = PAGE_SIZE):
        if kv_type not in KV_TYPES:
            raise ValueError(f"KV type must be one of {', '.join(KV_TYPES)}, got {kv_type!r}")
        num_pages = -(-tokens // page_size)
        self.kv_type, self.page_size = kv_type, page_size
        self.k = aligned((layers, num_pages, kv_heads, head_dim, page_size), KV_TYPES[kv_type])
        self.v = aligned((layers, num_pages, kv_heads, page_size, head_dim), KV_TYPES[kv_type])
        self.pool = PagePool(num_pages)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys and values, over all layers."""
        return (self.k.nbytes + self.v.nbytes) // self.k.shape[1]

    @property
    def used_bytes(self) -> int:
        return self.pool.used * self.page_bytes

    def arguments(self, layer: int) -> dict[str, int]:
        """What a kernel needs to reach one layer, under the names used in ARGS."""
        return {"cache.k": self.k[layer].ctypes.data, "cache.v": self.v[layer].ctypes.data,
                "cache.type": list(KV_TYPES).index(self.kv_type), "cache.page_size": self.page_size}

    def new_sequence(self) -> Sequence:
        """An empty sequence. Its pages return to the pool when it is truncated to nothing, or when nobody holds it any more."""
        return self._watched(Sequence())

    def _watched(self, sequence):
        weakref.finalize(sequence, self._give_back, self.pool, sequence.pages).atexit = False
        return sequence

    @staticmethod
    def _give_back(pool, pages):
        for page in pages:
            pool.release(page)

    def append(self, sequence: Sequence, count: int) -> np.ndarray:
        """Make room for `count` more tokens; -> slots [count] int32 (page * page_size + offset).

        A shared last page is copied first. CacheFull leaves the sequence as it was.
        """
        end = sequence.length + count
        missing = -(-end // self.page_size) - len(sequence.pages)
        last_shared = sequence.length % self.page_size and self.pool.references[sequence.pages[-1]] > 1
        if missing + bool(last_shared) > self.pool.free:
            raise CacheFull(f"KV cache is full: {count} more tokens need {missing} pages of {self.page_size}, "
                            f"{self.pool.free} are free; raise --ctx-size or shorten the text")
        if last_shared:
            self._own_last(sequence)
        sequence.pages += [self.pool.allocate() for _ in range(missing)]
        index = np.arange(sequence.length, end)
        sequence.length = end
        return (np.asarray(sequence.pages, np.int32)[index // self.page_size] * self.page_size + index % self.page_size).astype(np.int32)

    def _own_last(self, sequence):
        shared, own = sequence.pages[-1], self.pool.allocate()
        self.k[:, own], self.v[:, own] = self.k[:, shared], self.v[:, shared]
        self.pool.release(shared)
        sequence.pages[-1] = own

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Forget the tokens from `length` on."""
        if not 0 <= length <= sequence.length:
            raise ValueError(f"length must be 0 to {sequence.length} (the sequence's own), got {length}")
        keep = -(-length // self.page_size)
        for page in sequence.pages[keep:]:
            self.pool.release(page)
        del sequence.pages[keep:]
        sequence.length = length

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens; pages are shared until one of the two writes."""
        return self._watched(Sequence([self.pool.share(page) for page in sequence.pages], sequence.length))

    def read(self, sequence: Sequence, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [kv_heads, length, head_dim] float32, gathered: for tests and inspection."""
        pages = np.asarray(sequence.pages, np.int64)
        k, v = (x[layer][pages] for x in (self.k, self.v))
        k, v = (x.view(np.float16) if x.dtype == np.uint16 else x for x in (k, v))
        k = k.transpose(1, 0, 3, 2).reshape(k.shape[1], -1, k.shape[2])
        v = v.transpose(1, 0, 2, 3).reshape(v.shape[1], -1, v.shape[3])
        return k[:, :sequence.length].astype(np.float32), v[:, :sequence.length].astype(np.float32)
