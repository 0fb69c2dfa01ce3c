"""One layer's cache on the device with physically shuffled pages: for tests, benchmarks and the functions on NumPy arrays."""
import numpy as np

from edgeattn.arguments import Tensor, resolve_one
from edgeattn.kernels_cuda import device, exchange, read_pages, seal_pages
from edgeattn.kernels_cuda.page_pool import POOLS, RELEASED, Pages, kinds_of, make_table
from edgeattn.kernels_cuda.steps import run
from edgeattn.page_formats import PAGE, PageFormat

COUNT, SLOTS, AGE, INTERVAL, HEADER = range(5)  # of a list (kernels_cpu/selections.py)
COUNTS = ("tokens", "rows", "sequences", "probes")  # by index in `state` (edgeattn/batch.py)


class PagedCache:
    """
    formats    of the pools: floats, then what pages are sealed into, if anything
    lengths    tokens that each sequence holds before the step
    new        tokens that each gets in the step
    capacity   pages of a list of selected ones; 0: everything is read
    probes     last rows of each sequence whose attention is added to `mass` [sequences, 3, kv_heads, slots]
    """

    def __init__(self, formats: list[PageFormat], kv_heads: int, lengths: list[int], new: list[int], capacity: int = 0,
                 probes: int = 0):
        xp = device.cupy()
        self.formats, self.kv_heads, self.head_dim, self.new = formats, kv_heads, formats[0].head_dim, list(new)
        self.lengths = [length + n for length, n in zip(lengths, new)]
        counts = [-(-length // PAGE) for length in self.lengths]
        self.count = kv_heads * sum(counts) + 3
        self.pools = [Pages(f, self.count) for f in formats]
        self.table = make_table(self.pools)
        free = np.random.default_rng(0).permutation(self.count).astype(np.int32)
        self.entries = np.full((len(counts), kv_heads, max(counts) + 1), RELEASED, np.int32)
        for s, count in enumerate(counts):
            self.entries[s, :, :count] = free[:kv_heads * count].reshape(-1, count) * POOLS
            free = free[kv_heads * count:]
        self.lists = np.zeros((len(counts), 1, kv_heads, HEADER + capacity), np.int32)
        self.capacity, self._held = capacity, {}
        self.slot_counts = xp.asarray(np.repeat(np.array(self.lengths, np.int32)[:, None], kv_heads, 1))
        self.sealed = xp.ones((len(counts), kv_heads), np.int32)
        self.tables, self.selection = xp.asarray(self.entries), xp.asarray(self.lists)
        self.row_starts = xp.asarray(np.cumsum([0, *new]), np.int32)
        self.probes = probes
        self.mass = xp.zeros((len(counts), 3, kv_heads, self.entries.shape[2] * PAGE), np.float32)
        self.state = xp.asarray([sum(new), 0, len(new), probes], np.int64)
        self.exchange = xp.zeros(exchange.nbytes(exchange.most_blocks()), np.uint8)

    def fill(self, sequence: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Keys and values [kv_heads, tokens, head_dim] of a sequence's first tokens, into pages of floats."""
        xp, tokens = device.cupy(), keys.shape[1]
        dtype = np.float16 if self.formats[0].k_type == "f16" else np.float32
        k = self.pools[0].k.view(dtype).reshape(-1, self.head_dim, PAGE)
        v = self.pools[0].v.view(dtype).reshape(-1, PAGE, self.formats[0].width)
        slots = np.arange(tokens)
        for head in range(self.kv_heads):
            page, offset = xp.asarray(self.entries[sequence, head, slots // PAGE] // POOLS), xp.asarray(slots % PAGE)
            k[page, :, offset] = xp.asarray(keys[head])
            v[page, offset, :self.head_dim] = xp.asarray(values[head])

    def seal(self, sequence: int, first: int, last: int, pool: int = 1) -> None:
        """Quantise the logical pages first ... last of all heads."""
        sources = self.entries[sequence, :, first:last]
        seal_pages.run(self.table, self.head_dim, sources.ravel(), sources.ravel() + pool)
        sources += pool
        self.tables.set(self.entries)
        self.sealed[sequence] = last

    def read(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [kv_heads, length, head_dim] float32, as the pages give them back; zeros where pages are released."""
        length = self.lengths[sequence]
        entries = self.entries[sequence, :, :-(-length // PAGE)]
        k, v = read_pages.run(self.table, self.head_dim, np.maximum(entries, 0).ravel())
        k, v = k.get() * (entries.reshape(-1, 1, 1) >= 0), v.get() * (entries.reshape(-1, 1, 1) >= 0)
        k = k.reshape(self.kv_heads, -1, self.head_dim, PAGE).transpose(0, 1, 3, 2).reshape(self.kv_heads, -1, self.head_dim)
        return k[:, :length], v.reshape(self.kv_heads, -1, self.head_dim)[:, :length]

    def select(self, pages: np.ndarray, counts: np.ndarray) -> None:
        """Lists [sequences, kv_heads, capacity] and their counts [sequences, kv_heads], -1: everything."""
        self.lists[:, 0, :, COUNT], self.lists[:, 0, :, HEADER:HEADER + pages.shape[2]] = counts, pages
        self.selection.set(self.lists)

    def _addresses(self, name, array):
        """[sequences] int64 on the device: where each sequence's part of an array lies."""
        if name not in self._held:  # kernels that were made before hold its address
            self._held[name] = device.cupy().asarray([array.data.ptr + i * array.strides[0] for i in range(len(self.new))], np.int64)
        return self._held[name].data.ptr

    def extra(self) -> dict[str, int]:
        """What ARGS of cached_attention and select_pages ask for besides tensors and attributes."""
        each = {"page_tables": self.tables, "slot_counts": self.slot_counts, "sealed": self.sealed, "attention_mass": self.mass}
        return {f"batch.{name}": self._addresses(name, array) for name, array in each.items()} | {
            "batch.row_starts": self.row_starts.data.ptr, "batch.compensation": 0, "batch.prefill_lists": 0, "batch.index": 0,
            "batch.indexed": 0, "batch.selections": self._addresses("selections", self.selection),
            "selection.group": 0 if self.capacity else -1, "selection.capacity": self.capacity, "selection.width": 0,
            "cache.pools": self.table.data.ptr, "cache.max_pages": self.tables.shape[2], "cache.keys_rotated": 0,
            "cache.kinds": kinds_of(self.formats), "cache.exchange": self.exchange.data.ptr, "layer": 0,
            "batch.sequences": COUNTS.index("sequences"), "state": self.state.data.ptr,
            "batch.probes": COUNTS.index("probes"), "cache.mass_mode": 0, "cache.mass_plane": self.mass[0, 0].size}

    def bucket(self) -> dict:
        most = {"tokens": sum(self.new), "rows": 0, "sequences": len(self.new), "slots": max(self.lengths), "probes": self.probes}
        return most | {i: most.get(name, 0) for i, name in enumerate(COUNTS)}

    def arguments(self, kernel, tensors: dict, attributes: dict, extra: dict | None = None) -> dict:
        """What a kernel module's launches() gets for a step over CuPy arrays [tokens, ...] and arrays that must stay alive, under their
        names."""
        shapes = {name: x.shape if name in ("cos", "sin") else ("tokens", *x.shape[1:]) for name, x in tensors.items()}
        given = {name: Tensor(x.data.ptr, shapes[name], x.strides[0] // x.itemsize, str(x.dtype)) for name, x in tensors.items()}
        extra, attributes = self.extra() | (extra or {}), {"interleaved": 0, "window": 0} | attributes
        scratch_of = getattr(kernel, "workspace_bytes", lambda *given: 0)
        size = scratch_of(given, extra | attributes, max(self.bucket()["tokens"], 1), 1)
        scratch = self._held.setdefault(f"{size} bytes", device.cupy().full(size, 0xff, np.uint8))  # nothing may rely on zeros
        extra["workspace"] = scratch.data.ptr
        return {name: resolve_one(name, given, attributes, COUNTS, extra) for name in kernel.ARGS}

    def launches(self, kernel, tensors: dict, attributes: dict, extra: dict | None = None) -> list:
        return kernel.launches(self.arguments(kernel, tensors, attributes, extra), self.bucket())

    def run(self, kernel, tensors: dict, attributes: dict, extra: dict | None = None) -> None:
        run(self.launches(kernel, tensors, attributes, extra))
        device.cupy().cuda.get_current_stream().synchronize()
