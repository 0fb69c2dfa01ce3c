"""How a step runs on the GPU: an operator becomes kernel launches over device addresses, fixed once, which a CUDA graph holds.

A kernel module has
    ARGS                      the meaning of its arguments, the names of kernels_cpu/steps.py; "state" is the address of the counts
    workspace_bytes(tensors, attributes, rows, threads)   scratch memory that it needs, if any: address a["workspace"]. Among attributes
                              are the numbers of a cache that ARGS may name ("cache.max_pages")
    WORKSPACE_ROWS            the count that `rows` of workspace_bytes is, where that is not the largest of all
    launches(a, most)         -> list[Launch]. a: {name of ARGS: int}, addresses being device addresses. most: the bucket, the largest
                              counts that the launches must serve: most[i] for count i of `state` (so most[a["x.rows"]]), and under names
                              ("tokens", "rows", "sequences", "slots": cached tokens).
Counts that change from call to call are read by the kernels from `state` (int64, device memory) by index: grids are made for `most`, and
blocks past the count return. So one captured graph serves every call that fits its bucket, with no word from the host.
"""
import ctypes
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from edgeattn.arguments import Tensor, resolve_one
from edgeattn.kernels_cuda import compile, device

SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


@dataclass(frozen=True)
class Launch:
    """One kernel launch. `function` is compile.function's; args are NumPy scalars (np.int64 for addresses), in the kernel's order and of
    its types. overlap: the kernel calls wait_previous() (common.cuh), so that it may start before the kernel before it has ended. gang: how
    many blocks, neighbours in x, wait for each other (exchange.cuh); who launches sees to it that the device holds all blocks at once."""
    function: object
    grid: tuple[int, int, int]
    block: int
    args: tuple
    shared: int = 0       # bytes of dynamic shared memory
    overlap: bool = False
    gang: int = 1


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60)]


class _Config(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p),
                ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint)]


@cache
def _overlaps() -> bool:
    """Whether kernels of this device may start early: elsewhere wait_previous() does nothing."""
    return device.capability() >= 90 and not compile.forced_target()


def _launch(launch: Launch, stream: int) -> None:
    """By the driver itself: CuPy's launcher has no launch attributes."""
    held = [np.asarray(x) for x in launch.args]  # 0-dimensional arrays: somewhere for the driver to read them
    args = (ctypes.c_void_p * len(held))(*(x.ctypes.data for x in held))
    attribute = _Attribute(SERIALIZATION, 0, 1)
    count = int(launch.overlap and _overlaps())
    config = _Config(launch.grid, (launch.block, 1, 1), launch.shared, stream, ctypes.pointer(attribute), count)
    status = device.driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(launch.function.ptr), args, None)
    if status:
        raise RuntimeError(f"CUDA error {status} at launching {launch}")


def gangs_at_once(launch: Launch) -> int:
    """How many of a launch's gangs the device holds at once."""
    found = ctypes.c_int()
    device.driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(ctypes.byref(found), ctypes.c_void_p(launch.function.ptr), launch.block,
                                                                ctypes.c_size_t(launch.shared))
    return found.value * device.about()["processors"] // launch.gang


def run(launches: list[Launch], stream=None) -> None:
    """Enqueue launches on a CuPy stream (the current one)."""
    stream = stream or device.cupy().cuda.get_current_stream()
    for launch in launches:
        _launch(launch, stream.ptr)


class Graph:
    """Launches captured once; launch() replays them on the stream they were captured on (or another). One of its own waits for what was
    enqueued before on the current one, such as copies of what the launches read."""

    def __init__(self, launches: list[Launch], stream=None):
        xp = device.cupy()
        self.stream = stream or xp.cuda.Stream(non_blocking=True)
        if stream is None:
            self.stream.wait_event(xp.cuda.get_current_stream().record())
        with self.stream:
            self.stream.begin_capture()
            run(launches, self.stream)
            self._graph = self.stream.end_capture()
        self._graph.upload(self.stream)

    def launch(self, stream=None) -> None:
        self._graph.launch(stream or self.stream)


class Arrays:
    """Copies of NumPy arrays in device memory. Views of one array keep their place in it, so that strides mean the same."""

    def __init__(self):
        self._held = {}

    def _copy(self, array):
        base = array if array.base is None or not isinstance(array.base, np.ndarray) else array.base
        if id(base) not in self._held:
            self._held[id(base)] = base, device.cupy().asarray(np.ascontiguousarray(base).reshape(-1).view(np.uint8))
        return self._held[id(base)]

    def address(self, array: np.ndarray) -> int:
        base, copy = self._copy(array)
        return copy.data.ptr + array.ctypes.data - base.ctypes.data

    def fetch(self, array: np.ndarray) -> None:
        """What the device holds, into the array (and those it is a view of)."""
        base, copy = self._copy(array)
        base.reshape(-1).view(np.uint8)[:] = copy.get()


def call(kernel, tensors: dict, attributes: dict | None = None, extra: dict | None = None, most: dict | None = None,
         outputs: tuple[str, ...] = ("out",)) -> list[Launch]:
    """Run one step of a kernel module on NumPy arrays, the counterpart of kernels_cpu.steps.call; for tests and scripts.

    Each tensor's first dimension is a count of its own. Arrays among `extra` are copied to the device as well, and so is `state` if
    it is one of them; `outputs` are copied back. most: parts of the bucket that do not follow from the tensors ("slots").
    """
    arrays, attributes = Arrays(), attributes or {}
    tensors = {name: array for name, array in tensors.items() if array is not None}
    static = {name: replace(Tensor.of(array), address=arrays.address(array)) for name, array in tensors.items()}
    counted = {name: replace(tensor, shape=(name, *tensor.shape[1:])) for name, tensor in static.items()}
    counts = np.array([array.shape[0] for array in tensors.values()], np.int64)
    extra = {name: arrays.address(x) if isinstance(x, np.ndarray) else int(x) for name, x in ({"state": counts} | (extra or {})).items()}
    bucket = dict(enumerate(counts.tolist())) | (most or {})
    if hasattr(kernel, "workspace_bytes"):
        scratch = device.cupy().empty(max(kernel.workspace_bytes(static, extra | attributes, int(counts.max()), 1), 16), np.uint8)
        scratch.fill(0xff)  # nothing may rely on zeros
        extra["workspace"] = scratch.data.ptr
    a = {name: resolve_one(name, counted if name.endswith(".rows") else static, attributes, tuple(tensors), extra) for name in kernel.ARGS}
    made = kernel.launches(a, bucket)
    run(made)
    for name in outputs:
        arrays.fetch(tensors[name])
    return made


def pointers(a: dict[str, int], *names: str) -> tuple[np.int64, ...]:
    """Arguments of 64 bits: addresses and strides."""
    return tuple(np.int64(a[name]) for name in names)


def ints(a: dict[str, int], *names: str) -> tuple[np.int32, ...]:
    return tuple(np.int32(a[name]) for name in names)


def as_f32(bits: int) -> np.float32:
    """A float attribute, which stands in `a` as the bits of a float32."""
    return np.uint32(bits & 0xffffffff).view(np.float32)
