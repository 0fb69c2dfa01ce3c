"""The keys and values of whole pages of any format as floats: for policies that look at keys, for tests and inspection."""
import numpy as np
from numba import carray, cfunc, float32, int32, njit

from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_expand import expand_keys, expand_values
from edgeattn.kernels_cpu.page_pool import POOLS, Pages
from edgeattn.kernels_cpu.parallel import parallel, worker
from edgeattn.kernels_cpu.simd import at, load, store
from edgeattn.kernels_cpu.steps import STEP, aligned, call
from edgeattn.page_formats import PAGE, PageFormat

ARGS = ("pools", "entries", "entries.rows", "k", "v", "head_dim", "workspace")
PLACE = 128  # bytes of a thread's scratch before its floats


def read_pages(k_codes, k_params, v_codes, v_params, *, head_dim, k_type, v_type, k_axis="channel", one_group=0, separated=0, gate=16):
    pages = Pages(PageFormat(head_dim, k_type, v_type, k_axis, bool(one_group), bool(separated), gate=gate), len(k_codes))
    for array, given in zip(pages.arrays().values(), (k_codes, k_params, v_codes, v_params)):
        array[:] = given
    return run(pages.table_row()[None], head_dim, np.arange(len(k_codes)) * POOLS)


def run(table: np.ndarray, head_dim: int, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> k [pages, head_dim, 32], v [pages, 32, head_dim] float32 of the pages named by `entries`; table: a row for each pool."""
    entries = np.ascontiguousarray(entries, np.int32)
    tensors = {"entries": entries, "pools": table,
               "k": aligned((len(entries), head_dim, PAGE), np.float32), "v": aligned((len(entries), PAGE, head_dim), np.float32)}
    if len(entries):
        call(step, ARGS, tensors, {"head_dim": head_dim}, None, workspace_bytes)
    return tensors["k"], tensors["v"]


def workspace_bytes(tensors, attributes, rows, threads):
    return threads * _scratch(attributes["head_dim"])


def _scratch(head_dim):
    width = (head_dim + 31) // 32 * 32
    return PLACE + 4 * (32 * width + 4 * width + 64)


_scratch_bytes = njit(nogil=True, error_model="numpy")(_scratch)


@worker
def read_page(a, rows, first, i, thread):
    entry, depth = np.int64(at(int32, a[1])[i]), a[5]
    width = (depth + 31) // 32 * 32
    task = a[6] + thread * _scratch_bytes(depth)
    x = task + PLACE
    params = x + 4 * 32 * width
    expand_keys(a[0], depth, task, entry, a[3] + 4 * i * depth * PAGE, PAGE, 16, params)
    expand_values(a[0], width, task, entry, PAGE, x, params)
    source, out = at(float32, x), at(float32, a[4])
    for t in range(PAGE):
        for c in range(0, depth, 16):
            store(out, (i * PAGE + t) * depth + c, load(F, source, t * width + c))


@cfunc(STEP, cache=True)
def step(a, state):
    parallel(read_page(), carray(a, 1).ctypes.data, 0, 0, state[a[2]])
