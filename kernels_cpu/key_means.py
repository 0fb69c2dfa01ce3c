"""The mean key of each page of a layer: what stands for pages where a prompt chooses among them (edgeattn/policies/prefill/auto.py)."""
import numpy as np
from numba import carray, cfunc, float32, njit

from edgeattn.kernels_cpu import stored_keys
from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.parallel import parallel, worker
from edgeattn.kernels_cpu.read_pages import PLACE
from edgeattn.kernels_cpu.simd import at, hsum, load
from edgeattn.kernels_cpu.steps import STEP, aligned, call
from edgeattn.kernels_cpu.stored_keys import StoredKeys, expand_page
from edgeattn.page_formats import PAGE

ARGS = (*stored_keys.ARGS, "means", "means.1", "tasks", "tasks.rows", "workspace", "rest.2")
POOLS, ENTRIES, PAGES, REST, TOKENS, MEANS, ALL_PAGES, TASKS, TASKS_INDEX, WORKSPACE, DEPTH = range(len(ARGS))


def run(keys: StoredKeys) -> np.ndarray:
    """-> [kv_heads, pages, head_dim] float32; of a last page that is not full the mean over its tokens."""
    heads, _, depth = keys.rest.shape
    means = aligned((heads, -(-len(keys) // PAGE), depth), np.float32)
    call(step, ARGS, keys.tensors() | {"means": means, "tasks": np.empty(heads * means.shape[1])}, {}, None, workspace_bytes)
    return means


def _scratch(depth):
    return PLACE + 4 * (PAGE + 4) * depth


_scratch_bytes = njit(nogil=True, error_model="numpy")(_scratch)


def workspace_bytes(tensors, attributes, rows, threads):
    return threads * _scratch(tensors["rest"].shape[2])


@worker
def average_keys(a, rows, first, i, thread):
    depth, pages = a[DEPTH], a[ALL_PAGES]
    task = a[WORKSPACE] + thread * _scratch_bytes(depth)
    k = task + PLACE
    params = k + 4 * PAGE * depth
    count = expand_page(a[POOLS], a[ENTRIES], a[PAGES], a[REST], a[TOKENS], depth, i // pages, i % pages, task, params, k)
    keys, out, share = at(float32, k), at(float32, a[MEANS]), np.float32(1) / np.float32(count)
    for c in range(depth):
        out[i * depth + c] = hsum(load(F, keys, c * PAGE) + load(F, keys, c * PAGE + 16)) * share


@cfunc(STEP, cache=True)
def step(a, state):
    parallel(average_keys(), carray(a, 1).ctypes.data, 0, 0, state[a[TASKS_INDEX]])
