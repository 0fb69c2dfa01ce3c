"""The paged KV cache: page lists for each layer and KV head, copy-on-write sharing, quantised pages, eviction."""
import weakref

import numpy as np

from edgeattn.backend_cpu import CpuBackend
from edgeattn.cache import deltas
from edgeattn.cache.budget import MASS, SelectionPlan, plan_cache
from edgeattn.cache.eviction import evict
from edgeattn.cache.options import CacheOptions
from edgeattn.cache.pages import CacheFull, PagePool
from edgeattn.cache.release import make_room
from edgeattn.cache.sealing import seal
from edgeattn.cache.sequence import Sequence
from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.kernels_cpu.selections import HEADER
from edgeattn.page_formats import PAGE

DECODE_PROBES = 8  # decode steps of which one is probed


class KVCache:
    """Keys and values of all layers. `tokens` is the context size; `ubatch` the most tokens of a forward call.

    Pools hold pages of one format each (page_formats.py): pools[0] floats, which every token enters, the others quantised pages.
    ValueError: options that do not compose, or a budget too small.
    """

    def __init__(self, layers: int, kv_heads: int, head_dim: int, tokens: int, options: CacheOptions = CacheOptions(), ubatch: int = 512,
                 classes: np.ndarray | None = None, selection: SelectionPlan | None = None, backend=None):
        self.backend = backend or CpuBackend()
        self.options, self.shape, self.head_dim, self.tokens = options, (layers, kv_heads), head_dim, tokens
        self.plan = plan_cache(options, layers, kv_heads, head_dim, tokens, ubatch, classes, selection, self.backend.open_sequences)
        self.pools = [PagePool(f, n, self.backend.pages) for f, n in zip(self.plan.formats, self.plan.pages)]
        self.storage, self.eviction = options.storage_policy(), options.eviction_policy()
        self.probes = max((user.probes for user in options.probing()), default=0)
        self.table = self.backend.page_table([pool.pages for pool in self.pools])
        self._state_bytes = 0

    # ---- figures ------------------------------------------------------------------------------------------------
    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have before the cache is full; with eviction, as many as the context."""
        full = self.plan.limits if self.plan.classes is None else self.plan.limits[self.plan.classes]
        return self.tokens if self.eviction else min(self.tokens, int(full.min(initial=self.tokens)))

    @property
    def used_bytes(self) -> int:
        """Bytes of the pages in use, of page lists and per-token arrays."""
        return sum(pool.used_bytes for pool in self.pools) + self._state_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes that the cache may take at most, with one sequence: what a budget limits."""
        return self.plan.total_bytes()

    @property
    def exact(self) -> bool:
        """Whether it holds every token as it was computed: nothing is quantised or evicted."""
        return len(self.pools) == 1 and not self.plan.evicts

    def stored_bytes(self, sequence: Sequence) -> int:
        """Payload and parameters of a sequence's pages: what a dense decode step reads, once each (of deltas less: touched_bytes)."""
        entries = sequence.tables[sequence.tables != RELEASED]
        return sum(int((entries % POOLS == i).sum()) * pool.format.page_bytes for i, pool in enumerate(self.pools))

    def touched_bytes(self, sequence: Sequence) -> int:
        """What a dense decode step reads of a sequence's pages: stored_bytes less what pages of deltas left out."""
        return self.stored_bytes(sequence) - int(deltas.figures(self, sequence).unread.sum())

    def delta_figures(self, sequence: Sequence) -> deltas.DeltaFigures:
        """What pages of deltas leave out, and how far off scores may be for it, by layer and KV head."""
        return deltas.figures(self, sequence)

    def read_bytes(self, tokens: float) -> float:
        """What a dense decode step reads with `tokens` in the cache, if nothing was evicted: payload and parameters (of deltas at most)."""
        return self.shape[0] * self.shape[1] * float(self.head_bytes(tokens))

    def head_bytes(self, tokens: float | np.ndarray) -> np.ndarray:
        """Pages of a KV head that holds so many tokens: payload and parameters (of deltas at most)."""
        if len(self.pools) == 1:
            return np.asarray(tokens) * (self.pools[0].format.page_bytes / PAGE)
        kept = PAGE + self.options.window  # what stays floats, and behind it what fills a group of pages
        kept = kept + (tokens - kept) % (PAGE * self.storage.group)
        order = self.storage.pages()
        sealed = sum(self.pools[1 + i].format.page_bytes for i in order) / len(order)
        return (np.minimum(tokens, kept) * self.pools[0].format.page_bytes + np.maximum(0, tokens - kept) * sealed) / PAGE

    def arguments(self, layer: int) -> dict[str, int]:
        """What kernels need to reach the pages, under the names used in ARGS."""
        chosen = self.plan.selection
        return {"selection.width": chosen.width(self.plan.formats) if chosen else 0, "selection.capacity": chosen.capacity if chosen else 0,
                "cache.pools": self.backend.address(self.table), "cache.max_pages": self.plan.max_pages,
                "cache.keys_rotated": self.storage.rotated and self.options.quantised, "cache.quantised": int(self.options.quantised),
                "cache.mass_mode": self.plan.mass_mode,
                "cache.mass_plane": self.shape[0] * self.shape[1] * self.plan.max_pages * PAGE,
                "cache.progressive": int(np.float32(self.options.progressive).view(np.int32))}

    # ---- sequences ----------------------------------------------------------------------------------------------
    def new_sequence(self) -> Sequence:
        """An empty sequence. Its pages return to the pools when it is truncated to nothing, or when nobody holds it any more."""
        shape, slots, chosen = self.shape, self.plan.max_pages * PAGE, self.plan.selection
        width = chosen.width(self.plan.formats) if chosen else 0
        return self._watched(Sequence(
            np.full((*shape, self.plan.max_pages), RELEASED, np.int32), np.zeros(shape, np.int32), np.ones(shape, np.int32),
            np.zeros((*shape, slots), self.plan.position_type) if self.plan.tracked else None,
            np.zeros((self.plan.mass_planes, *shape, slots), np.float32) if self.plan.mass_mode else None,
            np.zeros((*shape, 1 + 2 * self.head_dim), np.float32) if self.options.compensated else None,
            np.zeros(shape, np.float32) if self.options.progressive else None,
            np.zeros(shape, np.int32) if self.options.shares_layers else None,
            *((np.zeros(slots, np.int32), np.zeros((self.plan.max_pages, *shape, self.head_dim), np.float16),
               np.zeros(self.plan.max_pages, bool)) if self.options.releases else ()),
            selection=np.zeros((chosen.groups, shape[1], HEADER + chosen.capacity), np.int32) if chosen else None,
            index=np.zeros((*shape, self.plan.max_pages, width), np.uint16) if width else None,
            indexed=np.zeros(shape, np.int32) if width else None,
            value_sums=np.zeros((*shape, 2 + self.head_dim), np.float32) if chosen and chosen.value_sums else None))

    def _watched(self, sequence):
        sequence.mirror = self.backend.mirror(sequence)
        self._state_bytes += sequence.nbytes
        weakref.finalize(sequence, self._forget, sequence.tables, sequence.nbytes).atexit = False
        return sequence

    def _forget(self, tables, nbytes):
        self._state_bytes -= nbytes
        self.release(tables.ravel())

    def release(self, entries: np.ndarray) -> None:
        """One holder less of each page."""
        for i, pool in enumerate(self.pools):
            pool.release(entries[(entries >= 0) & (entries % POOLS == i)] // POOLS)

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens; pages are shared until one of the two writes."""
        entries = sequence.tables[sequence.tables != RELEASED]
        for i, pool in enumerate(self.pools):
            pool.share(entries[entries % POOLS == i] // POOLS)
        sequence.shared = True
        return self._watched(sequence.copy())

    def append(self, sequence: Sequence, count: int) -> None:
        """Make room for `count` more tokens, at most a chunk. CacheFull leaves the sequence as it was."""
        if sequence.length + count > self.capacity:
            raise CacheFull(f"KV cache is full: it has room for {self.capacity} tokens and {sequence.length + count} are wanted; raise "
                            "--ctx-size or --kv-budget, choose fewer --kv-bits or a --kv-eviction method, or shorten the text")
        if count > sequence.room or sequence.shared:
            self._take_pages(sequence, count)
        positions = np.arange(sequence.length, sequence.length + count).astype(self.plan.position_type)
        for planes, new in ((sequence.positions, positions), (sequence.mass, 0)):
            if planes is not None:
                slots = sequence.counts[..., None] + np.arange(count)
                np.put_along_axis(planes, slots if planes.ndim == 3 else np.broadcast_to(slots, (len(planes), *slots.shape)), new, -1)
        sequence.counts += np.int32(count)
        sequence.room -= count
        sequence.length += count

    def _take_pages(self, sequence, count):
        used = -(-sequence.counts // PAGE)
        wanted = -(-(sequence.counts + count) // PAGE)
        if wanted.max() > self.plan.max_pages:
            raise CacheFull(f"KV cache is full: {count} more tokens do not fit; raise --ctx-size or --kv-budget, or shorten the text")
        missing = (wanted - used).ravel()
        last = self._shared_pages(sequence, (sequence.counts % PAGE > 0).nonzero(), (used - 1)[sequence.counts % PAGE > 0])
        new = self.pools[0].allocate(len(last[0]) + int(missing.sum())) * POOLS
        self._own(sequence, last, new[:len(last[0])])
        heads = np.repeat(np.arange(missing.size), missing)
        within = np.arange(len(heads)) - np.repeat(np.cumsum(missing) - missing, missing)
        sequence.tables.reshape(missing.size, -1)[heads, used.ravel()[heads] + within] = new[len(last[0]):]
        sequence.relisted(int(used.min()) - 1, int(wanted.max()))
        sequence.room = int((wanted * PAGE - sequence.counts).min())
        sequence.shared = False  # of all shared pages only the last is written by appending

    def _shared_pages(self, sequence, heads, pages):
        """Those of the float pages (heads, pages) that others hold as well, as indices into `tables`."""
        entries = sequence.tables[(*heads, pages)]
        others = self.pools[0].references[entries // POOLS] > 1
        return tuple(index[others] for index in (*heads, pages))

    def _own(self, sequence, where, new):
        """Copy shared pages into new ones."""
        old = sequence.tables[where]
        self.pools[0].copy(old // POOLS, new // POOLS)
        self.pools[0].release(old // POOLS)
        sequence.tables[where] = new
        if len(new):
            sequence.relisted(int(where[2].min()), int(where[2].max()) + 1)

    def own_floats(self, sequence: Sequence) -> None:
        """Make every page of floats of a sequence its own, before tokens are moved."""
        where = np.nonzero((sequence.tables != RELEASED) & (sequence.tables % POOLS == 0))
        shared = self._shared_pages(sequence, where[:2], where[2])
        if len(shared[0]):
            self._own(sequence, shared, self.pools[0].allocate(len(shared[0])) * POOLS)

    def limits(self, sequence: Sequence) -> np.ndarray:
        """[layers, kv_heads] tokens that each head of a sequence may hold between forward calls."""
        return self.plan.limits if sequence.limits is None or not sequence.limits.any() else sequence.limits

    def probes_for(self, sequence: Sequence, rows: int) -> int:
        """How many of a forward call's last rows are to be probed for the attention they pay, after append()."""
        if rows > 1 or not self.probes:
            return min(rows, self.probes)
        if self.plan.mass_mode & MASS["sum"] and sequence.length % DECODE_PROBES == 0:  # a sample is enough for a sum over many steps
            return 1
        return int(((sequence.counts > self.limits(sequence)) & (sequence.counts % PAGE == 0)).any())  # settle is about to evict

    def settle(self, sequence: Sequence, count: int) -> None:
        """After a forward call of `count` tokens: evict what is over the limits, then quantise pages that are full and older than the
        window. A decoded token changes nothing unless it fills a page."""
        if count == 1 and sequence.room:
            return
        if self.options.releases:
            make_room(self, sequence)
        elif self.plan.evicts and (sequence.counts > self.limits(sequence)).any():
            evict(self, sequence)
        if len(self.pools) > 1:
            seal(self, sequence)
        sequence.room = int((-sequence.counts % PAGE).min())

    def truncate(self, sequence: Sequence, length: int) -> int:
        """Forget the newest tokens, so that `length` are left, or fewer: a quantised page cannot take tokens again, so it goes as a
        whole, and what was evicted does not come back. -> the length that is left; the caller computes the rest again."""
        if not 0 <= length <= sequence.length:
            raise ValueError(f"length must be 0 to {sequence.length} (the sequence's own), got {length}")
        if length < sequence.exact_from:
            length = 0
        cut = 1
        while cut and 0 < length < sequence.length:  # heads may hold different counts: what spares one page may cut another
            keep = np.maximum(sequence.counts - (sequence.length - length), 0)
            inside = (keep < sequence.sealed * PAGE) & (keep >= PAGE)  # the cut goes through a quantised page
            cut = int(np.where(inside, keep % PAGE, 0).max())
            length -= min(cut, length)
        if length < sequence.exact_from:
            length = 0
        if 0 < length < sequence.length:
            if length % PAGE and (sequence.counts == sequence.length).all() and sequence.tables[0, 0, length // PAGE] == RELEASED:
                length = length // PAGE * PAGE  # nor can a released page
        gone = sequence.length - length
        counts = np.maximum(sequence.counts - gone, 0) if length else np.zeros_like(sequence.counts)
        keep = -(-counts // PAGE)
        drop = np.arange(self.plan.max_pages) >= keep[..., None]
        self.release(sequence.tables[drop])
        sequence.relisted(int(keep.min()), -(-int(sequence.counts.max()) // PAGE))
        sequence.tables[drop] = RELEASED
        sequence.counts[:] = counts
        sequence.sealed[:] = np.clip(sequence.sealed, 1, np.maximum(keep, 1))
        sequence.room, sequence.length = int((keep * PAGE - counts).min()), length
        sequence.moved(page=counts // PAGE)
        sequence.shared = sequence.answered = True  # the last page now may be one that was full when it was shared
        if not length:
            sequence.exact_from = 0
            if sequence.limits is not None:
                sequence.limits[:] = 0
            if sequence.compensation is not None:
                sequence.compensation[:] = 0
        return length

    def page_means(self, sequence: Sequence, layer: int) -> np.ndarray:
        """[kv_heads, max_pages, head_dim + width] float32: mean key and mean value of each full page; of others anything."""
        from edgeattn.kernels_cpu import page_means  # compiled only where a prompt is corrected
        width = self.pools[0].format.width
        found = np.empty((self.shape[1], self.plan.max_pages, self.head_dim + width), np.float32)
        page_means.run(self.table, self.head_dim, sequence.tables[layer].ravel(), found)
        return found

    def read(self, sequence: Sequence, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys (rotated where the storage does that) and values [slots, head_dim] float32 of one KV head."""
        count = int(sequence.counts[layer, head])
        entries = sequence.tables[layer, head, :-(-count // PAGE)]
        k, v = self.backend.read(self.table, self.head_dim, entries)
        return k.transpose(0, 2, 1).reshape(-1, self.head_dim)[:count], v.reshape(-1, self.head_dim)[:count]
