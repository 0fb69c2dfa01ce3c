"""Parallel loops over workers: C functions that compiled code calls by name.

Numba optimises a function again inside each of its callers, parallel loops among them, so that a kernel three calls deep is
compiled several times over. A worker is compiled once; steps link to its symbol, also when they come from the cache.
"""
import llvmlite.binding as llvm
from llvmlite import ir
from numba import carray, cfunc, get_thread_id, njit, prange, types
from numba.extending import intrinsic

ARGS = types.CPointer(types.int64)
WORKER = types.void(ARGS, types.int64, types.int64, types.int64, types.int64)


def variant(*of, **options):
    """njit for a function that another function makes several of, which `of` tells apart.

    Numba names compiled code after the function and a number that it counts up in each process. Two variants that two processes cached
    may have the same name then, and whoever loads both would silently run one in place of the other.
    """
    def compile(function):
        function.__qualname__ = "_".join([function.__qualname__, *(str(x) for x in of)])
        return njit(nogil=True, error_model="numpy", **options)(function)
    return compile


def worker(function):
    """Compile `function(args, rows, first, task, thread)`; returns what gives compiled code its address.

    args   the step's row of int64 arguments      first, task  `first` of `parallel`, and a number below `tasks`
    rows   a run-time count                       thread       which thread runs it, from 0
    """
    symbol = "edgeattn_" + function.__module__.rpartition(".")[2] + "_" + function.__name__.strip("_")
    compiled = cfunc(WORKER, cache=True, error_model="numpy")(function)
    llvm.add_symbol(symbol, compiled.address)

    @intrinsic
    def address(typingctx):
        def codegen(context, builder, sig, args):
            module = builder.module
            found = module.globals.get(symbol) or ir.Function(module, ir.FunctionType(ir.VoidType(), []), symbol)
            return builder.ptrtoint(found, ir.IntType(64))
        return types.int64(), codegen
    address.compiled = compiled  # keeps the code in memory
    return address


@intrinsic
def call_worker(typingctx, address, args, rows, first, task, thread):
    """Run a worker on this thread; args is the address of the row of arguments."""
    def codegen(context, builder, sig, values):
        i64 = ir.IntType(64)
        target = ir.FunctionType(ir.VoidType(), [i64.as_pointer(), i64, i64, i64, i64]).as_pointer()
        builder.call(builder.inttoptr(values[0], target), [builder.inttoptr(values[1], i64.as_pointer()), *values[2:]])
        return context.get_dummy_value()
    return types.void(*(types.int64,) * 6), codegen


@njit(parallel=True, nogil=True, error_model="numpy")
def parallel(address, args, rows, first, tasks):
    """Run a worker for each task, on all threads."""
    for task in prange(tasks):
        call_worker(address, args, rows, first, task, get_thread_id())


@njit(nogil=True, error_model="numpy")
def for_tasks(address, args, rows, first, tasks, many):
    """Run a worker for each task; on all threads only when there is `many` work, as a parallel region costs 2 us and more."""
    if many and tasks > 1:
        parallel(address, args, rows, first, tasks)
    else:
        for task in range(tasks):
            call_worker(address, args, rows, first, task, 0)


@njit(nogil=True, error_model="numpy")
def for_rows(address, a, rows, many):
    """for_tasks with a task for each row."""
    for_tasks(address, carray(a, 1).ctypes.data, rows, 0, rows, many)
