"""A GPU as a place for a plan and a cache (the counterpart of backend_cpu.py): weights, buffers and pages in device memory, steps as kernel
launches in one stream.

Launches are made once for each bucket of counts: powers of two of tokens, rows of logits, sequences and cached tokens. A bucket of decode
steps becomes a CUDA graph when it comes a second time; the first time compiles and loads its kernels. All that changes from step to step
lies in device memory (device_batch.py), so a graph is launched as it is.
"""
import mmap
from dataclasses import replace
from importlib import import_module

import numpy as np

from edgeattn import cuda_limits
from edgeattn.arguments import Tensor, resolve_one
from edgeattn.batch import COUNTS
from edgeattn.cache.budget import plan_cache
from edgeattn.device_batch import TO_DEVICE, DeviceBatch
from edgeattn.device_launches import Bucket, Step, Table
from edgeattn.device_pages import DevicePages
from edgeattn.device_sequence import DeviceSequence
from edgeattn.kernels_cuda import chosen_attention, device, exchange, page_pool, read_pages, seal_pages
from edgeattn.kernels_cuda.fused_steps import fuse
from edgeattn.kernels_cuda.steps import Graph, run
from edgeattn.page_formats import PAGE

CHUNK_BYTES = 16 << 20  # of a weight, copied at a time: the driver stages it, the host keeps no copy
SMALLEST_SLOTS = 256    # of a bucket
SELECTION_S = 36e-6     # that choosing pages, and reading them by a list, adds to a layer of a model: measured on an H200
TOGETHER_S, PROCESSORS = 12e-6, 128  # the same where one launch does both (chosen_attention.py), on so many processors or more
EFFECTIVE = 0.7         # of the memory's nominal rate, that attention reads at there at most: fewer bytes save no less time
SCORING_BYTES, SCORING_COPIES = 32 << 20, 6  # of device memory for eviction's scores or means at a time; arrays as large as keys at once
# Of attention, that a chunk must save a layer for choosing to pay: both grow with processors and clock. On an H200 512 tokens take 0.55 ms
# behind 4,096 and 0.63 with `auto`, 1.71 and 0.91 behind 30,720 (32 heads of 128): as long behind some 6,500.
PROMPT_FLOPS = 4.5e10
NEVER = 1 << 40         # tokens


class CudaBackend:
    device = "cuda"
    runs_segments = False
    outlives = 3        # steps that a value keeps its place after the last one that reads it: those may become one (fused_steps.py)
    open_sequences = 4  # that may be open at once where memory is not limited: their newest pages have a place from the beginning

    def __init__(self):
        xp = device.cupy()
        self.stream, self.weight_bytes = xp.cuda.Stream(non_blocking=True), 0
        self._held, self._maps, self._batch = {}, {}, None
        self._exchange = exchange.take(self)

    def check(self, options, about: dict, nodes) -> None:
        cuda_limits.check(options, about, nodes)

    def gives_way(self, options, sparse, prefill, about: dict, *cache) -> tuple[str, str]:
        return cuda_limits.gives_way(options, sparse, prefill, about, plan_cache(options, *cache, sequences=self.open_sequences))

    def tuned(self, config: dict, limited: bool) -> dict[str, int]:
        """`edgeattn tune` measures CPUs."""
        return {}

    # ---- memory -----------------------------------------------------------------------------------------------------
    def allocate(self, size: int):
        with self.stream:
            return device.cupy().zeros(max(size, 16), np.uint8)

    def address(self, array) -> int:
        if hasattr(array, "data") and hasattr(array.data, "ptr"):
            return array.data.ptr
        return self._batch.address(array) if self._batch is not None and self._batch.holds(array) else self._copied(array)

    def weight(self, array: np.ndarray) -> Tensor:
        """An initializer, copied once; the file's pages may go when all are (release_maps)."""
        return replace(Tensor.of(array), address=self._copied(array))

    def _copied(self, array):
        if not array.size:
            return 0
        if id(array) not in self._held:
            source = np.ascontiguousarray(array)
            with self.stream:
                copy = device.cupy().empty(source.nbytes, np.uint8)
            for start in range(0, source.nbytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, source.nbytes - start)
                device.cupy().cuda.runtime.memcpy(copy.data.ptr + start, source.ctypes.data + start, size, TO_DEVICE)
            self._held[id(array)] = array, copy  # the array is held so that its id stays its own
            self.weight_bytes += source.nbytes
            self._note_map(array)
        return self._held[id(array)][1].data.ptr

    def _note_map(self, array):
        while isinstance(array, np.ndarray):
            array = array.base
        if isinstance(array, mmap.mmap):
            self._maps[id(array)] = array

    def release_maps(self) -> None:
        """Tell the system that mapped weight files need not stay in memory: the device has them."""
        for found in self._maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                found.madvise(mmap.MADV_DONTNEED)

    def device_bytes(self) -> tuple[int, bool]:
        """What this process has allocated on the device, and whether that is the host's memory as well."""
        return device.cupy().get_default_memory_pool().total_bytes(), device.about()["integrated"]

    def free_bytes(self) -> tuple[int, bool]:
        """What the device has left for anybody, and whether that is the host's memory as well."""
        return device.cupy().cuda.runtime.memGetInfo()[0], device.about()["integrated"]

    def bandwidth(self, size: int = 256 << 20, repeats: int = 10) -> float:
        """Bytes per second that a copy within the device's memory reads and writes."""
        xp = device.cupy()
        with self.stream:
            source, target = xp.zeros(size, np.uint8), xp.zeros(size, np.uint8)
            events = [xp.cuda.Event() for _ in range(repeats + 1)]
            for event in events:
                xp.cuda.runtime.memcpyAsync(target.data.ptr, source.data.ptr, size, 3, self.stream.ptr)  # cudaMemcpyDeviceToDevice
                event.record(self.stream)
            events[-1].synchronize()
        return 2 * size / (1e-3 * float(np.median([xp.cuda.get_elapsed_time(a, b) for a, b in zip(events, events[1:])])))

    def counters(self, shape):
        """Zeros that kernels count in; `take_counters` reads them."""
        with self.stream:
            return device.cupy().zeros(shape, np.int64)

    def take_counters(self, counters) -> np.ndarray:
        """What was counted since the last time."""
        with self.stream:
            found = counters.get()
            counters.fill(0)
        return found

    def sparse_from(self, policy, token_bytes: float, formats) -> int:
        """Tokens in the context from which a decode policy saves a layer more time than it costs, by what is not read: an estimate from the
        memory's clock and width, until it is measured. token_bytes: keys and values of one token in one layer. formats: of the pages."""
        about, seconds = device.about(), SELECTION_S
        rate = EFFECTIVE * 2e6 * about["memory_clock_mhz"] * about["memory_bus_bits"] / 8
        by_heads = policy.index == "bounds" and policy.combine == "head"
        if self._exchange and by_heads and page_pool.kinds_of(list(formats)) in chosen_attention.KERNELS:
            seconds = min(seconds, TOGETHER_S * max(1, PROCESSORS / about["processors"]))
        return next((n for n in range(256, 1 << 20, 256) if n - policy.tokens(n) >= seconds * rate / token_bytes), NEVER)

    def lists_from(self, policy, token_flops: float) -> int:
        """Tokens in the context from which a prefill policy saves a layer more than it costs: an estimate. token_flops: of a chunk's
        attention to one token."""
        if policy.tokens(0) is None:
            return policy.min_len
        return next((n for n in range(256, 1 << 20, 256) if n - policy.tokens(n) >= PROMPT_FLOPS / token_flops), NEVER)

    def batch(self, max_tokens: int, max_rows: int, max_sequences: int, cache) -> DeviceBatch:
        cells = int(np.prod(cache.shape))
        self._batch = DeviceBatch(max_tokens, max_rows, max_sequences, cells, cache.plan.max_pages, self.stream, cache.options.compensated)
        return self._batch

    # ---- steps ------------------------------------------------------------------------------------------------------
    def load(self, operator: str):
        return import_module(f"edgeattn.kernels_cuda.{operator}")

    def step(self, name: str, operator: str, kernel, tensors: dict, attributes: dict, extra: dict, max_counts: dict, threads: int) -> Step:
        state = self._batch.address(self._batch.state) if self._batch is not None else 0
        extra = extra | {"workspace": 0, "state": state}
        arguments = {name: resolve_one(name, tensors, attributes, COUNTS, extra) for name in kernel.ARGS}
        rows = max_counts[kernel.WORKSPACE_ROWS] if hasattr(kernel, "WORKSPACE_ROWS") else max(max_counts.values())
        scratch = kernel.workspace_bytes(tensors, extra | attributes, rows, 1) if hasattr(kernel, "workspace_bytes") else 0
        return Step(name, operator, kernel, arguments, scratch)

    def table(self, made: list[Step], workspace) -> Table:
        for step in made:
            if "workspace" in step.arguments:
                step.arguments["workspace"] = workspace.data.ptr
        return Table(made)

    def run(self, table: Table, state: np.ndarray) -> None:
        """Enqueue a call; nothing waits for it here."""
        self._batch.upload()
        self.launch(table, self.bucket(state))

    def bucket(self, state: np.ndarray) -> Bucket:
        batch = self._batch
        tokens, rows, sequences, probes = (int(n) for n in state)
        most = len(batch.token_ids), len(batch.logit_rows), len(batch.row_starts) - 1  # scratch memory is no larger
        tokens, rows, sequences = (min(_power(n), limit) for n, limit in zip((tokens, rows, sequences), most))
        return Bucket(tokens, rows, sequences, max(SMALLEST_SLOTS, _power(batch.slots)), batch.sparse, batch.listed > 0,
                      _power(probes))

    def launch(self, table: Table, bucket: Bucket) -> None:
        if bucket in table.graphs:
            table.graphs[bucket].launch(self.stream)
            return
        launches = self.prepare(table, bucket)
        if bucket.decodes and bucket in table.ran:
            table.graphs[bucket] = Graph(launches, self.stream)
            table.graphs[bucket].launch(self.stream)
        else:
            run(launches, self.stream)
            table.ran.add(bucket)

    def prepare(self, table: Table, bucket: Bucket, progress=None) -> list:
        """The launches of a bucket; compiles kernels where that has not happened yet."""
        if bucket not in table.launches:
            found, steps = [], fuse(table.steps, bucket.most())
            for i, step in enumerate(steps):
                if progress:
                    progress(step.operator, i, len(steps))
                found += step.launches(bucket)
            table.launches[bucket] = found
        return table.launches[bucket]

    def ready(self, tables: list[Table], progress=None) -> None:
        """Compile and load what a prompt and a decode step need, once all weights are there."""
        self.release_maps()
        chunk = min(_power(len(self._batch.token_ids)), len(self._batch.token_ids))
        for table in tables:
            probing = any(step.arguments.get("cache.mass_mode") for step in table.steps)
            for tokens, *kind in ((1, True), (1, False), (chunk, False), *([(chunk, False, True)] if self._batch.holds_lists else []),
                                  *([(1, False, False, 1)] if probing else [])):
                self.prepare(table, Bucket(tokens, 1, 1, SMALLEST_SLOTS, *kind), progress)

    def fetch(self, tensor: Tensor, rows: int) -> np.ndarray:
        """The first rows of a float32 value, as the device has computed it."""
        found = np.empty((rows, tensor.stride), np.float32)
        if rows:
            device.cupy().cuda.runtime.memcpyAsync(found.ctypes.data, tensor.address, found.nbytes, 2, self.stream.ptr)
            self.wait()
        return found[:, :int(np.prod(tensor.shape[1:]))]

    def wait(self) -> None:
        self.stream.synchronize()

    # ---- pages ------------------------------------------------------------------------------------------------------
    def pages(self, page_format, count: int) -> DevicePages:
        return DevicePages(page_format, count, self.stream)

    def page_table(self, pools: list[DevicePages]):
        with self.stream:
            return page_pool.make_table(pools)

    def cache_arguments(self, formats) -> dict[str, int]:
        """What CUDA kernels ask for besides KVCache.arguments."""
        return {"cache.kinds": page_pool.kinds_of(list(formats)), "cache.exchange": self._exchange}

    def seal(self, table, head_dim: int, sources: np.ndarray, targets: np.ndarray) -> None:
        with self.stream:
            seal_pages.run(table, head_dim, sources, targets)

    def read(self, table, head_dim: int, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with self.stream:
            return tuple(x.get() for x in read_pages.run(table, head_dim, entries))

    def floats(self, table, head_dim: int, entries: np.ndarray) -> tuple:
        """read(), left on the device: NumPy's functions, called with arrays of CuPy, compute there."""
        with self.stream:
            return read_pages.run(table, head_dim, entries)

    def page_means(self, table, head_dim: int, entries: np.ndarray) -> np.ndarray:
        """As CpuBackend.page_means."""
        found = np.empty((len(entries), 2 * head_dim), np.float32)
        with self.stream:
            for part, k, v in self._parts(table, head_dim, entries):
                found[part, :head_dim], found[part, head_dim:] = _here(k.mean(2)), _here(v.mean(1))
        return found

    def key_norms(self, table, head_dim: int, entries: np.ndarray) -> np.ndarray:
        """As CpuBackend.key_norms."""
        found = np.empty((len(entries), PAGE), np.float32)
        with self.stream:
            for part, k, _ in self._parts(table, head_dim, entries):
                found[part] = _here(np.linalg.norm(k, axis=1))
        return found

    def _parts(self, table, head_dim, entries):
        """Which pages, their keys and values: floats on the device, a part at a time."""
        each = max(1, SCORING_BYTES // (4 * PAGE * 2 * head_dim))
        for first in range(0, len(entries), each):
            part = slice(first, first + each)
            yield part, *self.floats(table, head_dim, entries[part])

    def scored(self, scores, heads) -> np.ndarray:
        with self.stream:
            return _here(scores(heads))

    def scored_together(self, heads: int, numbers: int) -> int:
        return max(1, min(heads, SCORING_BYTES // (SCORING_COPIES * 4 * numbers)))

    def mirror(self, sequence) -> DeviceSequence:
        return DeviceSequence(sequence, self.stream)


def _here(x) -> np.ndarray:
    """An array of the device's, or one that is here already."""
    return x.get() if hasattr(x, "get") else x


def _power(n: int) -> int:
    """The next power of two; 0 stays."""
    return 1 << (n - 1).bit_length() if n else 0
