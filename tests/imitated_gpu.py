"""A GPU imitated in this machine's memory: what the runtime does for CUDA on the host, with the CPU's kernels in place of launches.

"Device" arrays are copies of their own, so whatever is not sent is missing. Kernels themselves are not imitated: test_cuda_*.py have them.
"""
import ctypes
from types import SimpleNamespace

import numpy as np

from edgeattn.backend_cpu import CpuBackend
from edgeattn.kernels_cpu import read_pages, seal_pages, steps
from edgeattn.kernels_cpu.page_pool import FIELDS, POOLS, Pages
from edgeattn.ops import load_kernel


class Array(np.ndarray):
    """As much of cupy.ndarray as is used."""
    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)

    def get(self):
        return np.array(self, subok=False)

    def set(self, x):
        self[...] = x


class Stream:
    ptr = 0

    def __init__(self, non_blocking=False):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def synchronize(self):
        pass


class Event:
    def __init__(self, disable_timing=False):
        pass

    def record(self, stream):
        pass

    def synchronize(self):
        pass


class Device:
    def synchronize(self):
        pass


class Runtime:
    """Copies, each told to `copies`: bytes."""

    def __init__(self):
        self.copies = []

    def memcpyAsync(self, target, source, size, kind, stream):
        self.copies.append(size)
        ctypes.memmove(target, source, size)

    def memcpy(self, target, source, size, kind):
        self.memcpyAsync(target, source, size, kind, 0)

    def memcpy2DAsync(self, target, target_pitch, source, source_pitch, width, height, kind, stream):
        self.copies.append(width * height)
        for row in range(height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)


def array(shape, dtype, value=0):
    """On a 64-byte boundary, as CPU kernels like it."""
    made = steps.aligned(shape, dtype)
    made[...] = value
    return made.view(Array)


def asarray(x, dtype=None):
    x = np.asarray(x, dtype)
    made = array(x.shape, x.dtype)
    made[...] = x
    return made


def cupy():
    """A module of the name, new for each test."""
    cuda = SimpleNamespace(Stream=Stream, Event=Event, Device=Device, runtime=Runtime(), alloc_pinned_memory=lambda size: bytearray(size),
                           get_current_stream=Stream)
    pool = SimpleNamespace(total_bytes=lambda: 0)
    return SimpleNamespace(cuda=cuda, zeros=array, full=lambda shape, value, dtype=np.float64: array(shape, dtype, value), asarray=asarray,
                           ones=lambda shape, dtype: array(shape, dtype, 1), arange=lambda *given: asarray(np.arange(*given)),
                           empty=lambda shape, dtype: array(shape, dtype, 0xaa if dtype == np.uint8 else 7), minimum=np.minimum,
                           get_default_memory_pool=lambda: pool)


def make_backend(monkeypatch):
    """CudaBackend, whose steps are the CPU's over the "device's" addresses. Sampling is the CPU's too."""
    from edgeattn import device_pages, device_sampling
    from edgeattn.cache.pages import HostPages
    from edgeattn.backend_cuda import CudaBackend, Table
    from edgeattn.kernels_cuda import attention_call, cached_attention, device
    module = cupy()
    for asking in (attention_call, cached_attention):
        monkeypatch.setattr(asking, "attribute", lambda name: {"MultiProcessorCount": 132}.get(name, 228 << 10))
    monkeypatch.setattr(cached_attention, "gangs_at_once", lambda launch: 264 // launch.gang)
    monkeypatch.setattr(device, "cupy", lambda: module)
    monkeypatch.setattr(device, "about", lambda: {"processors": 132, "shared_bytes": 227 << 10})
    monkeypatch.setattr(device_sampling.sample, "launches", lambda a, most: a)
    monkeypatch.setattr(device_sampling, "run", sample)
    monkeypatch.setattr(device_pages.move_tokens, "run", HostPages.move)
    monkeypatch.setattr(device_pages.move_tokens, "permute", HostPages.permute)

    class Imitation(CudaBackend):
        copies = module.cuda.runtime.copies
        buckets = []
        load = CpuBackend.load

        def step(self, name, operator, kernel, tensors, attributes, extra, max_counts, threads):
            if not hasattr(self, "nothing"):
                self.nothing, self.scores = array(1 << 20, np.uint8), array(1 << 20, np.uint8)
            missing = {name: self.nothing.data.ptr for name, value in extra.items() if name.startswith("batch.") and not value
                       and name not in ("batch.sequences", "batch.probes")}
            extra = extra | missing | {"selection.scores": self.scores.data.ptr}
            return CpuBackend.step(self, name, operator, kernel, tensors, attributes, extra, max_counts, threads)

        def table(self, made, workspace):
            CpuBackend.table(self, made, np.asarray(workspace))
            return Table(made)

        def ready(self, tables, progress=None):
            self.release_maps()

        def launch(self, table, bucket):
            self.buckets.append(bucket)
            state = self._batch.address(self._batch.state)
            steps.run(np.stack([step.row for step in table.steps]), np.ctypeslib.as_array((ctypes.c_int64 * 4).from_address(state)))

        def page_table(self, pools):
            table = np.zeros((POOLS, FIELDS), np.int64)
            for i, pool in enumerate(pools):
                table[i] = Pages.table_row(pool)
            return asarray(table)

        def seal(self, table, head_dim, sources, targets):
            seal_pages.run(np.asarray(table), head_dim, sources, targets)

        def read(self, table, head_dim, entries):
            return read_pages.run(np.asarray(table), head_dim, entries)
        floats = read
    return Imitation()


def sample(a, stream):
    """The operator `sample` at the addresses that its launches would get."""
    def at(name, dtype, count):
        return np.frombuffer((ctypes.c_uint8 * (count * np.dtype(dtype).itemsize)).from_address(a[name]), dtype)
    from edgeattn.kernels_cuda.sample import SETTINGS
    settings = dict(zip(SETTINGS, at("settings", np.float64, len(SETTINGS)).tolist()))
    history = at("history", np.int64, int(at("state", np.int64, 1)[0]))
    logits = np.array(at("logits", np.float32, a["logits.0"]))
    token = load_kernel("sample", "reference")(logits, history, **settings | {"top_k": int(settings["top_k"])})
    ctypes.memmove(a["token"], np.asarray(token, np.int64).ctypes.data, 8)
