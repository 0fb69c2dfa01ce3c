"""Attention over a paged cache for a whole batch, prefill and decode mixed, in one call.

The batch becomes one list of tasks: blocks of query tokens for sequences with several new tokens (the longest first), ranges
of pages for those with one. Threads take the next task until none is left; then the ranges of decode are merged.
"""
import numpy as np
from numba import carray, cfunc, njit, prange

from edgeattn.kernels_cpu.attention_call import ARGS, SPLITS, read_call, rows_of, workspace_bytes
from edgeattn.kernels_cpu.attention_decode import attend_range, merge_ranges, visible_pages
from edgeattn.kernels_cpu.attention_prefill import attend_block, query_blocks
from edgeattn.kernels_cpu.attention_write import write_tokens
from edgeattn.kernels_cpu.floats import fetch_add, thread_count
from edgeattn.kernels_cpu.steps import STEP, aligned, call as call_step, f32_at, i64_at, u16_at

PAGE_SIZE = 32
MIN_TOKENS = 256    # a smaller range of decode is not worth a task
SERIAL = 1 << 16    # fewer products of q and k than this are not worth a parallel region


def cached_attention(q, k, v, cos, sin, past_key, past_value, positions, *,
                     num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale, window=0, layer=0):
    cache = PagedCache([past_key], [past_value], [len(q)])
    out = attend(cache, q, k, v, cos, sin, positions, num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim,
                 interleaved=interleaved, scale=scale, window=window)
    return out, *cache.read(0)


class PagedCache:
    """A small cache with physically shuffled pages, for tests and scripts.

    past_keys, past_values  one [kv_heads, past, head_dim] float32 a sequence
    new                     how many tokens each sequence is about to get
    """

    def __init__(self, past_keys, past_values, new, *, dtype=np.float32, page_size=PAGE_SIZE):
        kv_heads, _, head_dim = past_keys[0].shape
        self.dtype, self.page_size, self.new = np.dtype(dtype), page_size, list(new)
        self.lengths = np.array([key.shape[1] + n for key, n in zip(past_keys, new)], np.int32)
        counts = -(-self.lengths // page_size)
        pages = np.random.default_rng(0).permutation(int(counts.sum()) + 3).astype(np.int32)
        self.tables = np.full((len(counts), int(counts.max()) + 1), -1, np.int32)
        for s, end in enumerate(np.cumsum(counts)):
            self.tables[s, :counts[s]] = pages[end - counts[s]:end]
        self.k = aligned((len(pages), kv_heads, head_dim, page_size), self.dtype)
        self.v = aligned((len(pages), kv_heads, page_size, head_dim), self.dtype)
        for s, (key, value) in enumerate(zip(past_keys, past_values)):
            page, offset = self.slots(s, 0, key.shape[1])
            self.k[page, :, :, offset], self.v[page, :, offset] = key.transpose(1, 0, 2), value.transpose(1, 0, 2)

    def slots(self, sequence, first, last):
        tokens = np.arange(first, last)
        return self.tables[sequence, tokens // self.page_size], tokens % self.page_size

    def read(self, sequence):
        """Keys and values [kv_heads, length, head_dim] float32."""
        page, offset = self.slots(sequence, 0, self.lengths[sequence])
        return (self.k[page, :, :, offset].transpose(1, 0, 2).astype(np.float32),
                self.v[page, :, offset].transpose(1, 0, 2).astype(np.float32))

    def new_slots(self):
        both = [self.slots(s, length - n, length) for s, (length, n) in enumerate(zip(self.lengths, self.new))]
        return np.concatenate([page * self.page_size + offset for page, offset in both]).astype(np.int32)


def attend(cache, q, k, v, cos, sin, positions, *, selection=None, **attributes):
    """Run one step over all sequences of `cache`, their new tokens one after the other in q, k, v; -> out.

    selection: (pages [sequences, kv_heads, capacity], counts [sequences, kv_heads]) int32, or None to read everything.
    """
    tensors = dict(q=q, k=k, v=v, cos=cos, sin=sin, out=aligned(q.shape, np.float32))
    pages, counts = selection or (None, None)
    addresses = {"batch.positions": np.ascontiguousarray(positions, np.int64), "batch.slots": cache.new_slots(),
                 "batch.row_starts": np.cumsum([0, *cache.new], dtype=np.int32), "batch.kv_lengths": cache.lengths,
                 "batch.page_tables": cache.tables, "cache.k": cache.k, "cache.v": cache.v,
                 "selection.pages": pages, "selection.counts": counts}
    numbers = {"batch.page_tables.stride": cache.tables.shape[1], "cache.type": int(cache.dtype == np.float16),
               "cache.page_size": cache.page_size, "selection.capacity": 0 if pages is None else pages.shape[2]}
    tensors["row_starts"] = addresses["batch.row_starts"][1:]  # its rows are the sequences
    numbers["batch.sequences"] = list(tensors).index("row_starts")
    extra = numbers | {name: 0 if array is None else array.ctypes.data for name, array in addresses.items()}
    call_step(step, ARGS, tensors, {"interleaved": 0, "window": 0} | attributes, extra, workspace_bytes)
    return tensors["out"]


# ---- tasks ------------------------------------------------------------------------------------------------------
@njit(nogil=True, error_model="numpy")
def _count_tasks(call):
    """Fill the task table, where each sequence's tasks start: prefill's, then decode's; -> (prefill tasks, decode tasks, pages in
    a range of decode)."""
    starts, pages = i64_at(call.starts, 1), np.int64(0)
    for s in range(call.sequences):
        if rows_of(call, s)[1] == 1:
            for h in range(call.kv_heads):
                pages += visible_pages(call, s, h)[1]
    size = call.threads * SPLITS
    size = max((pages + size - 1) // size, MIN_TOKENS // call.cache_page_size)
    prefill, decode = np.int64(0), np.int64(0)
    for s in range(call.sequences):
        starts[s], starts[call.sequences + 1 + s] = prefill, decode
        _, rows, _ = rows_of(call, s)
        if rows == 1:
            decode += call.kv_heads * _ranges(call, s, size)
        else:
            prefill += call.kv_heads * query_blocks(call, rows)
    starts[call.sequences], starts[2 * call.sequences + 1] = prefill, decode
    return prefill, decode, size


@njit(nogil=True, error_model="numpy")
def _ranges(call, sequence, size):
    """Into how many ranges of `size` pages a decode step's pages are cut; the same for all KV heads."""
    most = np.int64(1)
    for h in range(call.kv_heads):
        most = max(most, (visible_pages(call, sequence, h)[1] + size - 1) // size)
    return most


@njit(nogil=True, error_model="numpy")
def _find(starts, at, sequences, task):
    """The last sequence whose tasks start at or before `task`."""
    low, high = np.int64(0), sequences
    while high - low > 1:
        middle = (low + high) // 2
        if starts[at + middle] <= task:
            low = middle
        else:
            high = middle
    return low


@njit(nogil=True, error_model="numpy")
def _run_task(call, k, v, task, prefill, size, scratch):
    starts = i64_at(call.starts, 1)
    if task < prefill:
        s = _find(starts, 0, call.sequences, task)
        task -= starts[s]
        blocks = query_blocks(call, rows_of(call, s)[1])
        attend_block(call, k, v, s, task % call.kv_heads, blocks - 1 - task // call.kv_heads, scratch)
        return
    task -= prefill
    s = _find(starts, call.sequences + 1, call.sequences, task)
    part = (task - starts[call.sequences + 1 + s]) // call.kv_heads
    width = call.group * (call.head_dim + 16)
    partial = f32_at(call.partials + 4 * task * width, width)
    attend_range(call, k, v, s, task % call.kv_heads, part * size, (part + 1) * size, scratch, partial)


@njit(nogil=True, error_model="numpy")
def _run_tasks(call, thread, prefill, tasks, size):
    counter, scratch = i64_at(call.workspace, 1), f32_at(call.scratch + 4 * thread * call.scratch_size, call.scratch_size)
    task = fetch_add(counter, 0, 1)
    while task < tasks:
        if call.cache_type:
            _run_task(call, u16_at(call.cache_k, 1), u16_at(call.cache_v, 1), task, prefill, size, scratch)
        else:
            _run_task(call, f32_at(call.cache_k, 1), f32_at(call.cache_v, 1), task, prefill, size, scratch)
        task = fetch_add(counter, 0, 1)


@njit(parallel=True, nogil=True, error_model="numpy")
def _run_parallel(call, threads, prefill, tasks, size):
    for thread in prange(threads):
        _run_tasks(call, thread, prefill, tasks, size)


@njit(nogil=True, error_model="numpy")
def _attend(call):
    write_tokens(call)
    prefill, decode, size = _count_tasks(call)
    i64_at(call.workspace, 1)[0] = 0
    tokens = np.int64(0)
    for s in range(call.sequences):
        _, rows, length = rows_of(call, s)
        tokens += rows * length
    if call.threads > 1 and tokens * call.num_heads * call.head_dim > SERIAL:
        _run_parallel(call, call.threads, prefill, prefill + decode, size)
    else:
        _run_tasks(call, 0, prefill, prefill + decode, size)
    starts = i64_at(call.starts, 1)
    for s in range(call.sequences):
        first = starts[call.sequences + 1 + s]
        ranges = (starts[call.sequences + 2 + s] - first) // call.kv_heads
        if ranges:
            for h in range(call.kv_heads):
                merge_ranges(call, s, h, first, ranges)


@cfunc(STEP, cache=True)
def step(a, state):
    _attend(read_call(carray(a, len(ARGS)), state[a[11]], state[a[25]], thread_count()))
