"""Attention over a paged cache for a whole batch, prefill and decode mixed, in one call.

The batch becomes one list of tasks: blocks of query tokens for sequences with several new tokens (the longest first), ranges
of pages for those with one. Threads take the next task until none is left; then the ranges of decode are merged.
"""
from importlib import import_module

import numpy as np
from numba import cfunc, int64, njit

from edgeattn.kernels_cpu.attention_call import (ARGS, CALL, COUNTER, HEAD_DIM, KV_HEADS, MASS_MODE, NUM_HEADS, PAGE, PREFILL,
                                                 PREFILL_LISTED, PREFILL_LISTS, PREFILL_TASKS, PROBES, PROBES_INDEX, RANGE_PAGES,
                                                 ROWS_INDEX, SEQUENCES, SEQUENCES_INDEX, SPLITS, STARTS, TASKS, THREADS, WORKSPACE,
                                                 make_call, query_blocks, rows_of, slots_of, workspace_bytes)
from edgeattn.kernels_cpu.attention_decode import attend_range, merge_ranges, visible_pages
from edgeattn.kernels_cpu.attention_mass import probe_head
from edgeattn.kernels_cpu.attention_write import write_tokens
from edgeattn.kernels_cpu.floats import fetch_add
from edgeattn.kernels_cpu.page_pool import POOLS, Pages
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.selections import COUNT, HEADER
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import STEP, aligned, call as call_step, thread_count
from edgeattn.page_formats import PageFormat

MIN_TOKENS = 256    # a smaller range of decode is not worth a task
SERIAL = 1 << 16    # fewer products of q and k than this are not worth a parallel region


def cached_attention(q, k, v, cos, sin, past_key, past_value, positions, *,
                     num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale, window=0, layer=0):
    cache = PagedCache([past_key], [past_value], [len(q)])
    out = attend(cache, q, k, v, cos, sin, positions, num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim,
                 interleaved=interleaved, scale=scale, window=window)
    return out, *cache.read(0)


def links(attributes, extra) -> dict[str, int]:
    """Addresses of the workers that read prompts, compiled only where they are used: quantised caches are read in 8 bits, and lists too."""
    int8 = extra.get("cache.quantised", 0)

    def address(as_bytes):
        name = "attention_prefill_int8" if as_bytes else "attention_prefill"
        return getattr(import_module(f"edgeattn.kernels_cpu.{name}"), "attend_block_int8" if as_bytes else "attend_block").compiled.address
    return {"prefill.attend": address(int8), "prefill.attend_listed": address(True) if extra.get("prefill.sparse", 0) else 0}


class PagedCache:
    """One layer's cache of floats with physically shuffled pages, for tests and scripts.

    past_keys, past_values  one [kv_heads, past, head_dim] float32 a sequence
    new                     how many tokens each sequence is about to get
    kv_type                 "f32" or "f16"
    """

    def __init__(self, past_keys, past_values, new, *, kv_type="f32"):
        self.kv_heads, _, self.head_dim = past_keys[0].shape
        self.new, self.lengths = list(new), [key.shape[1] + n for key, n in zip(past_keys, new)]
        counts = [-(-length // PAGE) for length in self.lengths]
        self.pages = Pages(PageFormat(self.head_dim, kv_type, kv_type), self.kv_heads * sum(counts) + 3)
        free = np.random.default_rng(0).permutation(self.kv_heads * sum(counts) + 3).astype(np.int32)
        self.tables = np.full((len(counts), self.kv_heads, max(counts) + 1), -1, np.int32)  # of sequences, not layers
        for s, count in enumerate(counts):
            self.tables[s, :, :count] = free[:self.kv_heads * count].reshape(-1, count) * POOLS
            free = free[self.kv_heads * count:]
        self.slot_counts = np.repeat(np.array(self.lengths, np.int32)[:, None], self.kv_heads, 1)
        self.mass = np.zeros((len(counts), 3, self.kv_heads, self.tables.shape[2] * PAGE), np.float32)
        dtype = {"f32": np.float32, "f16": np.float16}[kv_type]
        self.k = self.pages.k.view(dtype).reshape(-1, self.head_dim, PAGE)
        self.v = self.pages.v.view(dtype).reshape(-1, PAGE, self.pages.format.width)
        for s, (key, value) in enumerate(zip(past_keys, past_values)):
            page, offset = self.places(s, 0, key.shape[1])
            self.k[page, :, offset], self.v[page, offset, :self.head_dim] = key, value

    def places(self, sequence, first, last):
        """(pages [kv_heads, tokens], offsets [tokens]) of slots."""
        slots = np.arange(first, last)
        return self.tables[sequence][:, slots // PAGE] // POOLS, slots % PAGE

    def read(self, sequence):
        """Keys and values [kv_heads, length, head_dim] float32."""
        page, offset = self.places(sequence, 0, self.lengths[sequence])
        return self.k[page, :, offset].astype(np.float32), self.v[page, offset, :self.head_dim].astype(np.float32)


def attend(cache, q, k, v, cos, sin, positions, *, selection=None, probes=0, mass_mode=0, keys_rotated=0, **attributes):
    """Run one step over all sequences of `cache`, their new tokens one after the other in q, k, v; -> out.

    selection: (pages [sequences, kv_heads, capacity], counts [sequences, kv_heads]) int32, or None to read everything.
    """
    lists, capacity = lists_of(*selection) if selection else (None, 0)
    tensors, attributes, extra, _kept = bind(cache, q, k, v, cos, sin, positions, attributes, lists, capacity, probes, mass_mode,
                                             keys_rotated)
    call_step(step, ARGS, tensors, attributes, extra | links(attributes, extra), workspace_bytes)
    return tensors["out"]


def bind(cache, q, k, v, cos, sin, positions, attributes, lists=None, capacity=0, probes=0, mass_mode=0, keys_rotated=0):
    """What steps.call wants: (tensors, attributes, extra), and arrays that must stay alive meanwhile. lists: selections.py, one group."""
    tensors = dict(q=q, k=k, v=v, cos=cos, sin=sin, out=aligned(q.shape, np.float32))
    unlisted = np.zeros(len(cache.new), np.int64)
    selections = np.array([0 if lists is None else row.ctypes.data for row in (cache.new if lists is None else lists)], np.int64)
    pools = np.stack([cache.pages.table_row()] * POOLS)
    each = {name: np.array([a.ctypes.data for a in arrays], np.int64)
            for name, arrays in (("page_tables", cache.tables), ("slot_counts", cache.slot_counts), ("attention_mass", cache.mass))}
    addresses = {"batch.positions": np.ascontiguousarray(positions, np.int64),
                 "batch.row_starts": np.cumsum([0, *cache.new], dtype=np.int32),
                 **{f"batch.{name}": array for name, array in each.items()}, "batch.compensation": None, "batch.confidence": None,
                 "cache.pools": pools,
                 "batch.selections": selections, "batch.prefill_lists": unlisted}
    numbers = {"cache.max_pages": cache.tables.shape[2], "selection.group": -1 if lists is None else 0, "selection.capacity": capacity,
               "layer": 0, "cache.mass_mode": mass_mode, "cache.mass_plane": cache.mass[0, 0].size, "cache.keys_rotated": keys_rotated,
               "cache.progressive": 0}
    tensors["row_starts"] = addresses["batch.row_starts"][1:]  # its rows are the sequences
    tensors["probes"] = np.empty(probes)
    numbers |= {f"batch.{name}": list(tensors).index(tensor) for name, tensor in (("sequences", "row_starts"), ("probes", "probes"))}
    extra = numbers | {name: 0 if array is None else array.ctypes.data for name, array in addresses.items()}
    return tensors, {"interleaved": 0, "window": 0} | attributes, extra, (each, addresses, pools)


def lists_of(pages, counts):
    """A selection [sequences, kv_heads, capacity], [sequences, kv_heads] as kernels want it, and its capacity."""
    sequences, kv_heads, capacity = pages.shape
    lists = np.zeros((sequences, kv_heads, HEADER + capacity), np.int32)
    lists[..., COUNT], lists[..., HEADER:] = counts, pages
    return lists, capacity


# ---- tasks ------------------------------------------------------------------------------------------------------
@njit(nogil=True, error_model="numpy")
def _most_pages(call, sequence):
    """How many pages a decode step reads of the KV head that reads most: all heads are cut into as many ranges as that one."""
    most = np.int64(1)
    for h in range(call[KV_HEADS]):
        most = max(most, visible_pages(call, sequence, h)[1])
    return most


@worker
def count_tasks(call, rows, first, task, thread):
    """How many tasks there are, how long decode's ranges, and the table of where each sequence's tasks start: prefill's, decode's."""
    starts, pages, sequences = at(int64, call[STARTS]), np.int64(0), call[SEQUENCES]
    for s in range(sequences):
        if rows_of(call, s)[1] == 1:
            pages += call[KV_HEADS] * _most_pages(call, s)
    size = call[THREADS] * SPLITS
    call[RANGE_PAGES] = max((pages + size - 1) // size, MIN_TOKENS // PAGE)
    prefill, decode = np.int64(0), np.int64(0)
    for s in range(sequences):
        starts[s], starts[sequences + 1 + s] = prefill, decode
        _, new = rows_of(call, s)
        if new == 1:
            decode += call[KV_HEADS] * ((_most_pages(call, s) + call[RANGE_PAGES] - 1) // call[RANGE_PAGES])
        else:
            prefill += call[KV_HEADS] * query_blocks(call, s, new)
    starts[sequences], starts[2 * sequences + 1] = prefill, decode
    call[PREFILL_TASKS], call[TASKS] = prefill, prefill + decode


@njit(nogil=True, error_model="numpy")
def _find(starts, first, sequences, task):
    """The last sequence whose tasks start at or before `task`."""
    low, high = np.int64(0), sequences
    while high - low > 1:
        middle = (low + high) // 2
        if starts[first + middle] <= task:
            low = middle
        else:
            high = middle
    return low


@worker
def run_tasks(call, rows, first, share, thread):
    """Take tasks until none is left."""
    starts, heads, address = at(int64, call[STARTS]), call[KV_HEADS], call[WORKSPACE] + CALL
    task = fetch_add(at(int64, call[WORKSPACE] + COUNTER), 0, 1)
    while task < call[TASKS]:
        if task < call[PREFILL_TASKS]:
            s = _find(starts, 0, call[SEQUENCES], task)
            index = task - starts[s]
            block = query_blocks(call, s, rows_of(call, s)[1]) - 1 - index // heads  # the last sees the most tokens
            attend = call[PREFILL_LISTED] if at(int64, call[PREFILL_LISTS])[s] else call[PREFILL]
            call_worker(attend, address, s, index % heads, block, thread)
        else:
            index = task - call[PREFILL_TASKS]
            s = _find(starts, call[SEQUENCES] + 1, call[SEQUENCES], index)
            index -= starts[call[SEQUENCES] + 1 + s]
            call_worker(attend_range(), address, s, index % heads, index // heads, thread)
        task = fetch_add(at(int64, call[WORKSPACE] + COUNTER), 0, 1)


@njit(nogil=True, error_model="numpy")
def _attend(call, address):
    write_tokens(call, address)
    call_worker(count_tasks(), address, 0, 0, 0, 0)
    at(int64, call[WORKSPACE] + COUNTER)[0] = 0
    work, starts = np.int64(0), at(int64, call[STARTS])
    for s in range(call[SEQUENCES]):
        work += rows_of(call, s)[1] * slots_of(call, s, 0) * call[NUM_HEADS] * call[HEAD_DIM]
    if call[THREADS] > 1 and work > SERIAL:
        parallel(run_tasks(), address, 0, 0, call[THREADS])
    else:
        call_worker(run_tasks(), address, 0, 0, 0, 0)
    for s in range(call[SEQUENCES]):
        first = call[SEQUENCES] + 1 + s
        ranges = (starts[first + 1] - starts[first]) // call[KV_HEADS]
        if ranges:
            for h in range(call[KV_HEADS]):
                call_worker(merge_ranges(), address, ranges, s, h, 0)
    if call[MASS_MODE] and call[PROBES]:
        for s in range(call[SEQUENCES]):
            parallel(probe_head(), address, s, 0, call[KV_HEADS])


@cfunc(STEP, cache=True)
def step(a, state):
    call = make_call(a, state[a[ROWS_INDEX]], state[a[SEQUENCES_INDEX]], state[a[PROBES_INDEX]], thread_count())
    _attend(call, a[WORKSPACE] + CALL)
