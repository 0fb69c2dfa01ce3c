"""How compiled code calls a kernel: a step is a C function over a row of int64 arguments.

A kernel file declares `ARGS`, the meaning of its row, and `step`, the function. `resolve` fills a row once, when a model is
loaded; afterwards the whole token runs inside one compiled loop over rows (`run`), so that Python costs nothing between
operators. Numbers that change from call to call (tokens, rows ...) are read from `state`, a small int64 array, by index.

Names in ARGS:
    x            address of tensor x (0 when an optional one is absent)
    x.rows       index in `state` of how many rows x has
    x.stride     elements from one row of x to the next
    x.groups     product of the dimensions between the first and the last
    x.width      last dimension
    x.0, x.1 ..  that dimension, a constant
    x.type       0 float32, 1 float16 (as uint16 bits), 2 uint8
    epsilon ...  an attribute: an int, the bits of a float32 (read with `as_f32`) or a code from CODES
    others       an int looked up in `extra`, such as "workspace", "cache.k", "batch.slots"
"""
import numpy as np
from llvmlite import ir
from numba import carray, get_num_threads, njit, types
from numba.extending import intrinsic
from numba.np.ufunc.parallel import _launch_threads

from edgeattn.arguments import CODES, TYPES, Tensor, resolve, resolve_one  # some for those who import them from here

_launch_threads()  # a step loaded from the cache finds the threading symbols only once the pool exists

STEP = types.void(types.CPointer(types.int64), types.CPointer(types.int64))
WIDTH = 80  # int64 arguments of one step, the function's address first


def make_row(kernel, tensors: dict, attributes: dict, counts: tuple[str, ...], extra: dict) -> np.ndarray:
    """A kernel module's step as `run` takes it: [WIDTH] int64. links(attributes, extra) of the module, if it has one, gives what else is to
    be loaded for these attributes; attribute `group` says which lists of a selection are meant."""
    extra = extra | ({"selection.group": attributes["group"]} if "group" in attributes else {})
    extra |= kernel.links(attributes, extra) if hasattr(kernel, "links") else {}
    row = np.zeros(WIDTH, np.int64)
    row[:1 + len(kernel.ARGS)] = kernel.step.address, *resolve(kernel.ARGS, tensors, attributes, counts, extra)
    return row


def call(step, args: tuple[str, ...], tensors: dict, attributes: dict | None = None, extra: dict | None = None,
         workspace_bytes=None) -> None:
    """Run one step on NumPy arrays, each array's first dimension being its row count. For tests and scripts.

    workspace_bytes(tensors, attributes, rows, threads) -> int: scratch memory that the step needs, if any.
    """
    tensors = {name: array for name, array in tensors.items() if array is not None}
    attributes, extra = attributes or {}, dict(extra or {})
    static = {name: Tensor.of(array) for name, array in tensors.items()}
    counted = {name: Tensor.of(array, rows=name) for name, array in tensors.items()}
    state = np.array([array.shape[0] for array in tensors.values()], np.int64)
    if workspace_bytes is not None:
        scratch = aligned(workspace_bytes(static, attributes, int(state.max()), get_num_threads()), np.uint8)
        extra["workspace"] = scratch.ctypes.data
    row = np.zeros((1, WIDTH), np.int64)
    row[0, 0] = step.address
    for i, name in enumerate(args):
        row[0, 1 + i] = resolve_one(name, counted if name.endswith(".rows") else static, attributes, tuple(tensors), extra)
    run(row, state)


def aligned(shape, dtype) -> np.ndarray:
    """Zeros on a 64-byte boundary; NumPy promises 16, and then every 64-byte load may split over two cache lines."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + size].view(dtype).reshape(shape)


@intrinsic
def thread_count(typingctx):
    """How many threads a parallel loop uses. (Numba's own get_num_threads is a ctypes pointer: what calls it is not cached.)"""
    def codegen(context, builder, sig, args):
        function = ir.FunctionType(ir.IntType(64), [])
        name = "get_num_threads"
        return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, function, name), [])
    return types.int64(), codegen


# ---- inside a step ---------------------------------------------------------------------------------------------
@intrinsic
def _pointer(typingctx, dtype, address):
    pointer = types.CPointer(dtype.dtype)

    def codegen(context, builder, sig, args):
        return builder.inttoptr(args[1], context.get_value_type(pointer))
    return pointer(dtype, types.int64), codegen


@njit
def f32_at(address, n):
    """The n float32 at an address, as an array."""
    return carray(_pointer(types.float32, address), n)


@njit
def i64_at(address, n):
    return carray(_pointer(types.int64, address), n)


@njit
def i32_at(address, n):
    return carray(_pointer(types.int32, address), n)


@njit
def u16_at(address, n):
    return carray(_pointer(types.uint16, address), n)


@njit
def u8_at(address, n):
    return carray(_pointer(types.uint8, address), n)


@intrinsic
def as_f32(typingctx, bits):
    """The float32 whose bits are the low half of an int64."""
    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.trunc(args[0], ir.IntType(32)), ir.FloatType())
    return types.float32(types.int64), codegen


# ---- the loop over steps ---------------------------------------------------------------------------------------
@intrinsic
def _call_step(typingctx, function, args, state):
    def codegen(context, builder, sig, values):
        pointer = ir.IntType(64).as_pointer()
        target = ir.FunctionType(ir.VoidType(), [pointer, pointer]).as_pointer()
        builder.call(builder.inttoptr(values[0], target), [builder.inttoptr(v, pointer) for v in values[1:]])
        return context.get_dummy_value()
    return types.void(types.int64, types.int64, types.int64), codegen


@njit("void(int64[:,::1], int64[::1])", nogil=True, cache=True)
def run(steps, state):
    """Run every row of `steps`: column 0 is the step's address, the rest its arguments."""
    for i in range(steps.shape[0]):
        _call_step(steps[i, 0], steps.ctypes.data + (i * steps.shape[1] + 1) * 8, state.ctypes.data)
