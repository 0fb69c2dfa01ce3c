"""The mean key and the mean value of whole pages: what attention takes for those it does not read (edgeattn/prefill_corrections.py)."""
import numpy as np
from numba import carray, cfunc, float32, int32, njit

from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_expand import expand_keys, expand_values
from edgeattn.kernels_cpu.parallel import parallel, worker
from edgeattn.kernels_cpu.read_pages import PLACE
from edgeattn.kernels_cpu.simd import at, hsum, load, splat, store
from edgeattn.kernels_cpu.steps import STEP, call
from edgeattn.page_formats import PAGE

ARGS = ("pools", "entries", "entries.rows", "means", "head_dim", "workspace")


def run(table: np.ndarray, head_dim: int, entries: np.ndarray, means: np.ndarray) -> None:
    """entries [pages] int32, below 0 for none; means [pages, head_dim + width] float32: keys, then values, written where there is a page.
    table: a row for each pool. What a page holds behind its last token counts as well."""
    call(step, ARGS, {"entries": entries, "pools": table, "means": means}, {"head_dim": head_dim}, None, workspace_bytes)


def workspace_bytes(tensors, attributes, rows, threads):
    width = -(-attributes["head_dim"] // PAGE) * PAGE
    return threads * _scratch(width)


def _scratch(width):
    return PLACE + 4 * (2 * PAGE * width + 4 * width + 64)


_scratch_bytes = njit(nogil=True, error_model="numpy")(_scratch)


@worker
def average_page(a, rows, first, i, thread):
    entry, depth = np.int64(at(int32, a[1])[i]), a[4]
    width = (depth + PAGE - 1) // PAGE * PAGE
    if entry < 0:
        return
    task = a[5] + thread * _scratch_bytes(width)
    k = task + PLACE
    v = k + 4 * PAGE * width
    params = v + 4 * PAGE * width
    expand_keys(a[0], depth, task, entry, k, PAGE, 16, params)
    expand_values(a[0], width, task, entry, PAGE, v, params)
    keys, values, out, share = at(float32, k), at(float32, v), at(float32, a[3] + 4 * i * (depth + width)), np.float32(1 / PAGE)
    for c in range(depth):
        out[c] = hsum(load(F, keys, c * PAGE) + load(F, keys, c * PAGE + 16)) * share
    for c in range(0, width, 16):
        total = splat(F, np.float32(0))
        for t in range(PAGE):
            total += load(F, values, t * width + c)
        store(out, depth + c, total * splat(F, share))


@cfunc(STEP, cache=True)
def step(a, state):
    parallel(average_page(), carray(a, 1).ctypes.data, 0, 0, state[a[2]])
