"""Page list of the first pages and the most recent ones, for each KV head."""
import numpy as np
from numba import cfunc, int32, int64, njit

from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import STEP, call
from edgeattn.page_formats import PAGE

ARGS = ("batch.slot_counts", "batch.sequences", "kv_heads", "layer", "selection.pages", "selection.counts", "selection.capacity",
        "sink_pages", "window_pages")


def select_sink_window(slot_counts, *, kv_heads, capacity, sink_pages, window_pages, layer=0):
    pages = np.full((len(slot_counts), kv_heads, capacity), -1, np.int32)
    counts = np.zeros((len(slot_counts), kv_heads), np.int32)
    each = np.array([row.ctypes.data - 4 * layer * kv_heads for row in slot_counts], np.int64)
    call(step, ARGS, {"slot_counts": slot_counts}, dict(kv_heads=kv_heads, sink_pages=sink_pages, window_pages=window_pages, layer=layer),
         {"batch.slot_counts": each.ctypes.data, "selection.pages": pages.ctypes.data, "selection.counts": counts.ctypes.data,
          "batch.sequences": 0, "selection.capacity": capacity})
    return pages, counts


@njit(nogil=True, error_model="numpy")
def _select(slots, pages, sink_pages, window_pages):
    """Writes one head's list; -> how many."""
    total, count = (slots + PAGE - 1) // PAGE, 0
    recent = max(min(sink_pages, total), total - window_pages)  # first page of the window
    for page in range(min(sink_pages, total)):
        pages[count] = page
        count += 1
    for page in range(recent, total):
        pages[count] = page
        count += 1
    return count


@cfunc(STEP, cache=True)
def step(a, state):
    kv_heads, capacity, counts = a[2], a[6], at(int32, a[5])
    for s in range(state[a[1]]):
        slots = at(int32, at(int64, a[0])[s])
        for h in range(kv_heads):
            i = s * kv_heads + h
            counts[i] = _select(np.int64(slots[a[3] * kv_heads + h]), at(int32, a[4] + 4 * i * capacity), a[7], a[8])
