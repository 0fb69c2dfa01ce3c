"""One call of cached_attention: its arguments by name, where its scratch memory lies, and how pages are addressed.

Pools of one layer (page size 16, 32 or 64 tokens; float32, or halves as uint16):
    K  [page, kv_head, head_dim, page_size]   channel-major: 16 tokens of a channel are one load, scores need no horizontal sum
    V  [page, kv_head, page_size, head_dim]
Kernels work on segments: 16 tokens of one page, the width of a vector.
"""
import numpy as np
from numba import int32, int64, njit

from edgeattn.kernels_cpu.float_tiles import ROWS
from edgeattn.kernels_cpu.simd import at

ARGS = ("q", "q.stride", "k", "k.stride", "v", "v.stride", "cos", "cos.stride", "sin", "out", "out.stride", "q.rows",
        "num_heads", "kv_heads", "head_dim", "rotary_dim", "interleaved", "scale", "window",
        "batch.positions", "batch.slots", "batch.row_starts", "batch.kv_lengths", "batch.page_tables", "batch.page_tables.stride",
        "batch.sequences", "cache.k", "cache.v", "cache.type", "cache.page_size",
        "selection.pages", "selection.counts", "selection.capacity", "workspace")
# The call: these arguments and what follows from them, as int64 in the workspace, for all threads.
(Q, Q_STRIDE, K, K_STRIDE, V, V_STRIDE, COS, COS_STRIDE, SIN, OUT, OUT_STRIDE, ROWS_INDEX, NUM_HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM,
 INTERLEAVED, SCALE, WINDOW, POSITIONS, SLOTS, ROW_STARTS, KV_LENGTHS, PAGE_TABLES, PAGE_TABLES_STRIDE, SEQUENCES_INDEX,
 K_POOL, V_POOL, CACHE_TYPE, PAGE_SIZE, SELECTED, SELECTED_COUNTS, SELECTED_CAPACITY, WORKSPACE) = range(len(ARGS))
(TOKENS, SEQUENCES, THREADS, GROUP, STARTS, ROTATED, KEYS_ROTATED, PARTIALS, SCRATCH, SCRATCH_SIZE, PREFILL_TASKS, TASKS, RANGE_PAGES,
 SEGMENT_SHIFT, FIELDS) = range(len(ARGS), len(ARGS) + 15)
COUNTER, CALL = 0, 64  # byte offsets in the workspace: the next task; the call

SPLITS = 4           # decode tasks for each thread, so that a late thread costs little
CHUNK = 512          # tokens that decode scores before it weighs their values
KEYS = 128           # tokens that prefill scores at once
QUERIES = 192        # rows (query tokens x heads of a group) that prefill works on at once
DECODE_ROWS = 4      # query heads in decode's register tile


def scratch_floats(head_dim: int, group: int) -> int:
    """Floats of one thread: what a prefill task or a decode task needs, whichever is more."""
    rows = (max(1, QUERIES // group) * group + ROWS - 1) // ROWS * ROWS
    prefill = 2 * KEYS * head_dim + rows * (2 * head_dim + 32) + ROWS * (KEYS + 16)
    heads = -(-group // DECODE_ROWS) * DECODE_ROWS
    return -(-max(prefill, heads * (CHUNK + head_dim + 64)) // 16) * 16


def workspace_bytes(tensors, attributes, rows, threads):
    """Task counter and table, rotated q and k, partial results of decode, scratch of each thread."""
    heads, kv_heads, head_dim = (int(attributes[name]) for name in ("num_heads", "kv_heads", "head_dim"))
    group = heads // kv_heads
    partials = (rows * kv_heads + threads * SPLITS) * group * (head_dim + 16)  # as many ranges as count_tasks makes at most
    floats = (rows * heads + DECODE_ROWS) * head_dim + rows * kv_heads * head_dim + partials + threads * scratch_floats(head_dim, group)
    return 1024 + 16 * (rows + 8) + 4 * floats


_scratch_floats = njit(nogil=True, error_model="numpy")(scratch_floats)


@njit(nogil=True, error_model="numpy")
def make_call(a, tokens, sequences, threads):
    """Write the call, from the step's row of arguments, to the workspace."""
    call = at(int64, a[WORKSPACE] + CALL)
    for i in range(FIELDS):
        call[i] = a[i] if i <= WORKSPACE else 0
    heads, kv_heads, depth = a[NUM_HEADS], a[KV_HEADS], a[HEAD_DIM]
    group = heads // kv_heads
    call[TOKENS], call[SEQUENCES], call[THREADS], call[GROUP] = tokens, sequences, threads, group
    call[SEGMENT_SHIFT] = 0 if a[PAGE_SIZE] == 16 else 1 if a[PAGE_SIZE] == 32 else 2  # 16 tokens each
    call[STARTS] = a[WORKSPACE] + CALL + 8 * FIELDS
    call[ROTATED] = (call[STARTS] + 16 * (max(tokens, sequences) + 8) + 63) // 64 * 64
    call[KEYS_ROTATED] = call[ROTATED] + 4 * (tokens * heads + DECODE_ROWS) * depth
    call[PARTIALS] = call[KEYS_ROTATED] + 4 * tokens * kv_heads * depth
    call[SCRATCH] = call[PARTIALS] + 4 * (sequences * kv_heads + threads * SPLITS) * group * (depth + 16)
    call[SCRATCH_SIZE] = _scratch_floats(depth, group)
    return call


@njit(nogil=True, error_model="numpy")
def rows_of(call, sequence):
    """(first row, rows, cached tokens) of a sequence; the rows are its newest tokens."""
    starts = at(int32, call[ROW_STARTS])
    first = np.int64(starts[sequence])
    return first, np.int64(starts[sequence + 1]) - first, np.int64(at(int32, call[KV_LENGTHS])[sequence])


@njit(nogil=True, error_model="numpy")
def page_base(call, sequence, head, logical):
    """First element of a page of one KV head, the same in both pools."""
    physical = np.int64(at(int32, call[PAGE_TABLES])[sequence * call[PAGE_TABLES_STRIDE] + logical])
    return (physical * call[KV_HEADS] + head) * call[HEAD_DIM] * call[PAGE_SIZE]


@njit(nogil=True, error_model="numpy")
def first_visible(call, position):
    """The first cached token that the token at `position` sees."""
    return max(0, position + 1 - call[WINDOW]) if call[WINDOW] > 0 else 0
