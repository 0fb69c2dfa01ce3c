"""The driver of kv_driver.py with a policy: decode steps choose what they read as a model's layers do, over random keys and values."""
from importlib import import_module

import numpy as np

from edgeattn import calibration
from edgeattn.batch import COUNTS
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu import steps
from edgeattn.kernels_cpu.selections import ALL, COUNT, HEADER
from edgeattn.kernels_cpu.steps import Tensor, aligned
from edgeattn.principal_components import save_components
from edgeattn.scheduler import Scheduler, SparseOptions
from kv_driver import Driver

LAYERS, KV_HEADS, DEPTH, GROUP = 4, 2, 32, 4
HEADS = KV_HEADS * GROUP
CONFIG = {"model": {"num_layers": LAYERS, "kv_heads": KV_HEADS, "num_heads": HEADS, "head_dim": DEPTH, "landmark_period": 64}, "files": {}}


def model_folder(path):
    """A folder with the calibration that policies need, its thresholds below every score; -> it."""
    components = np.linalg.qr(np.random.default_rng(3).standard_normal((LAYERS, KV_HEADS, DEPTH, DEPTH)))[0]
    save_components(path, CONFIG, components.astype(np.float32), 0)
    thresholds = np.tile(np.array([-1e9, 0], np.float32), (LAYERS, HEADS, 1))
    calibration.save(path / calibration.FILE, CONFIG, {"thresholds": thresholds}, {"thresholds": {}})
    return path


class SparseDriver(Driver):
    """folder: of a calibration (model_folder), for policies that need one."""

    def __init__(self, method, options, cache=CacheOptions(k_type="f16", v_type="f16"), tokens=4096, folder=None):
        self.scheduler = Scheduler(SparseOptions(method, options, 0), LAYERS, KV_HEADS)
        self.scheduler.load(folder, CONFIG)
        super().__init__(KVCache(LAYERS, KV_HEADS, DEPTH, tokens, cache, selection=self.scheduler.selection_plan(tokens)), GROUP)
        self.scheduler.prepare(8, self.cache.plan.max_pages)
        tensors = {name: Tensor.of(getattr(self, name), "tokens") for name in ("q", "k", "v", "out")}
        tensors |= {"cos": Tensor.of(self.cos), "sin": Tensor.of(self.sin)}
        about = dict(num_heads=HEADS, kv_heads=KV_HEADS, head_dim=DEPTH, rotary_dim=DEPTH, interleaved=0, scale=self.scale, window=0)
        self.sparse_rows, self.scratch = [], self.workspace[:0]
        for layer in range(LAYERS):
            rows = []
            for name, attributes in [*self.scheduler.operators(layer), ("cached_attention", {})]:
                kernel, attributes = import_module(f"edgeattn.kernels_cpu.{name}"), about | {"layer": layer} | attributes
                self.scratch = aligned(max(self.scratch.nbytes, kernel.workspace_bytes(tensors, attributes, len(self.q), 2)), np.uint8)
                rows.append((kernel, attributes))
            self.sparse_rows.append(rows)
        for layer, rows in enumerate(self.sparse_rows):
            extra = self.batch.arguments() | self.cache.arguments(layer) | self.scheduler.arguments(layer)
            for i, (kernel, attributes) in enumerate(rows):
                rows[i] = steps.make_row(kernel, tensors, attributes, COUNTS, extra | {"workspace": self.scratch.ctypes.data})

    def decode(self, sequence, parts, sparse=True):
        """One token -> (outputs [layers, 1, heads, head_dim], pages of each [layer][kv head]: None where it reads all)."""
        self.batch.clear()
        self.cache.append(sequence, 1)
        self.batch.add(sequence, np.zeros(1, np.int64), np.arange(0), self.cache.probes_for(sequence, 1), sparse)
        outputs = []
        for layer in range(LAYERS):
            for name, x in zip(("q", "k", "v"), parts):
                getattr(self, name)[:1] = x[layer].reshape(1, -1)
            steps.run(np.array(self.sparse_rows[layer]), self.batch.state)
            outputs.append(self.out[:1].reshape(1, -1, DEPTH).copy())
        found = self.lists(sequence)
        self.cache.settle(sequence, 1)
        return np.array(outputs), found

    def lists(self, sequence):
        found = []
        for source in self.scheduler.sources:
            if source is None:
                found.append([None] * KV_HEADS)
            else:
                rows = sequence.selection[self.scheduler.groups.index(source)]
                found.append([None if row[COUNT] == ALL else row[HEADER:HEADER + row[COUNT]].tolist() for row in rows])
        return found
