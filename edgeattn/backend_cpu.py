"""What a plan and a cache need of the machine they run on; here the CPU. backend_cuda.py is the same for a GPU.

A backend allocates memory, holds weights, makes a plan's steps and runs them, and keeps the cache's pages. Addresses are the device's own.
"""
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import psutil

from edgeattn import device_profile
from edgeattn.arguments import Tensor
from edgeattn.batch import COUNTS, Batch
from edgeattn.cache.pages import HostPages
from edgeattn.kernels_cpu import PROFILE, read_pages, seal_pages, steps
from edgeattn.kernels_cpu.page_pool import FIELDS, POOLS


@dataclass(frozen=True)
class Step:
    """One native operator: which node it came from, and its row of the table (a function's address and its arguments)."""
    name: str
    operator: str
    row: np.ndarray
    workspace_bytes: int


class CpuBackend:
    device = "cpu"
    runs_segments = True  # nodes that no kernel knows run in onnxruntime, over the same memory
    outlives = 0          # steps that a value keeps its place in the arena after the last one that reads it
    open_sequences = 64  # that may be open at once where memory is not limited: it is touched only when used

    def check(self, options, about: dict, nodes) -> None:
        """ValueError: a cache (CacheOptions) or a model (edgeattn.json's sizes, its graph's nodes) that this device does not run."""

    def gives_way(self, options, sparse, prefill, about: dict, *cache) -> tuple[str, str]:
        """Why sparse decode steps and sparse prompts give way to reading everything; cache: what plan_cache() wants besides options."""
        return "", ""

    def tuned(self, config: dict, limited: bool) -> dict[str, int]:
        """`threads` and `ubatch` where `edgeattn tune` found better ones than the defaults for models of this shape. config: edgeattn.json;
        limited: the cache has a budget, from which larger chunks would take."""
        found = device_profile.part(PROFILE, "models").get(device_profile.shape(config), {})
        names = ["threads"] if limited else ["threads", "ubatch"]
        return {name: found[name] for name in names if type(found.get(name)) is int and found[name] > 0}

    # ---- memory -----------------------------------------------------------------------------------------------------
    def allocate(self, size: int) -> np.ndarray:
        """`size` bytes; address() says where. ValueError: more than the machine has."""
        if size > psutil.virtual_memory().total:
            raise ValueError(f"a call of this model needs {size >> 30} GiB between operators, more than this machine has; use a smaller "
                             "ubatch")
        return steps.aligned(size, np.uint8)

    def address(self, array: np.ndarray) -> int:
        """Where kernels find an array: of allocate(), of the batch, or one that they only read and that never changes."""
        return array.ctypes.data

    def weight(self, array: np.ndarray) -> Tensor:
        """An initializer: the mapped file as it is."""
        return Tensor.of(array)

    def batch(self, max_tokens: int, max_rows: int, max_sequences: int, cache) -> Batch:
        return Batch(max_tokens, max_rows, max_sequences)

    # ---- steps ------------------------------------------------------------------------------------------------------
    def load(self, operator: str):
        """The kernel's module; the first time on a machine this compiles it."""
        return import_module(f"edgeattn.kernels_cpu.{operator}")

    def step(self, name: str, operator: str, kernel, tensors: dict, attributes: dict, extra: dict, max_counts: dict, threads: int) -> Step:
        row = steps.make_row(kernel, tensors, attributes, COUNTS, extra | {"workspace": 0})
        size = getattr(kernel, "workspace_bytes", lambda *_: 0)
        return Step(name, operator, row, size(tensors, attributes, max(max_counts.values()), threads))

    def table(self, made: list[Step], workspace: np.ndarray) -> np.ndarray:
        """Consecutive steps as `run` takes them, with their scratch memory."""
        for step in made:
            args = self.load(step.operator).ARGS
            if "workspace" in args:
                step.row[1 + args.index("workspace")] = workspace.ctypes.data
        return np.stack([step.row for step in made])

    def ready(self, tables: list[np.ndarray], progress=None) -> None:
        """All steps are made: what is left to do before the first call. Nothing here."""

    def run(self, table: np.ndarray, state: np.ndarray) -> None:
        steps.run(table, state)

    def wait(self) -> None:
        """Until all calls are done; here they are."""

    # ---- pages ------------------------------------------------------------------------------------------------------
    pages = HostPages

    def page_table(self, pools: list[HostPages]) -> np.ndarray:
        """A row for each pool."""
        table = np.zeros((POOLS, FIELDS), np.int64)
        for i, pool in enumerate(pools):
            table[i] = pool.table_row()
        return table

    def cache_arguments(self, formats) -> dict[str, int]:
        """What kernels ask for besides KVCache.arguments."""
        return {}

    def seal(self, table, head_dim: int, sources: np.ndarray, targets: np.ndarray) -> None:
        """Quantise the pages of entries `sources` into those of `targets`."""
        seal_pages.run(table, head_dim, sources, targets)

    def read(self, table, head_dim: int, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """K [pages, head_dim, 32] and V [pages, 32, head_dim], float32."""
        return read_pages.run(table, head_dim, entries)

    floats = read  # where eviction policies compute

    def page_means(self, table, head_dim: int, entries: np.ndarray) -> np.ndarray:
        """[pages, 2 * head_dim] float32: mean key and mean value of each page."""
        k, v = self.read(table, head_dim, entries)
        return np.concatenate([k.mean(2), v.mean(1)], 1)

    def key_norms(self, table, head_dim: int, entries: np.ndarray) -> np.ndarray:
        """[pages, 32] float32: the norm of each key."""
        return np.linalg.norm(self.read(table, head_dim, entries)[0], axis=1)

    def scored(self, scores, heads) -> np.ndarray:
        """What an eviction policy makes of floats()."""
        return scores(heads)

    def scored_together(self, heads: int, numbers: int) -> int:
        """How many of so many KV heads, of `numbers` floats each, an eviction policy scores at once."""
        return heads

    def mirror(self, sequence) -> None:
        """What kernels read of a sequence where its arrays are out of their reach; nothing here."""
        return None
