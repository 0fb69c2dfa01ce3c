"""Page list of the first pages and the most recent ones, the same for every KV head."""
import numpy as np
from numba import cfunc, njit

from edgeattn.kernels_cpu.steps import STEP, call, i32_at

ARGS = ("batch.kv_lengths", "batch.sequences", "kv_heads", "cache.page_size", "selection.pages", "selection.counts",
        "selection.capacity", "sink_pages", "window_pages")


def select_sink_window(kv_lengths, *, kv_heads, page_size, capacity, sink_pages, window_pages):
    pages = np.full((len(kv_lengths), kv_heads, capacity), -1, np.int32)
    counts = np.zeros((len(kv_lengths), kv_heads), np.int32)
    addresses = {"batch.kv_lengths": kv_lengths, "selection.pages": pages, "selection.counts": counts}
    call(step, ARGS, {"kv_lengths": kv_lengths}, {"kv_heads": kv_heads, "sink_pages": sink_pages, "window_pages": window_pages},
         {name: array.ctypes.data for name, array in addresses.items()}
         | {"batch.sequences": 0, "cache.page_size": page_size, "selection.capacity": capacity})
    return pages, counts


@njit(nogil=True, error_model="numpy")
def _select(kv_lengths, sequences, kv_heads, page_size, pages, counts, capacity, sink_pages, window_pages):
    for s in range(sequences):
        total = (kv_lengths[s] + page_size - 1) // page_size
        recent = max(min(sink_pages, total), total - window_pages)  # first page of the window
        for h in range(kv_heads):
            at = (s * kv_heads + h) * capacity
            count = 0
            for page in range(min(sink_pages, total)):
                pages[at + count] = page
                count += 1
            for page in range(recent, total):
                pages[at + count] = page
                count += 1
            counts[s * kv_heads + h] = count


@cfunc(STEP, cache=True)
def step(a, state):
    sequences, kv_heads, capacity = state[a[1]], a[2], a[6]
    _select(i32_at(a[0], sequences), sequences, kv_heads, a[3], i32_at(a[4], sequences * kv_heads * capacity),
            i32_at(a[5], sequences * kv_heads), capacity, a[7], a[8])
