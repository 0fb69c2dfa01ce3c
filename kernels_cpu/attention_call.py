"""One call of cached_attention: its arguments by name, where its scratch memory lies, and how pages are addressed.

Pools of one layer (page size 16, 32 or 64 tokens; float32, or halves as uint16):
    K  [page, kv_head, head_dim, page_size]   channel-major: 16 tokens of a channel are one load, scores need no horizontal sum
    V  [page, kv_head, page_size, head_dim]
Kernels work on segments: 16 tokens of one page, the width of a vector.
"""
from collections import namedtuple

import numpy as np
from numba import njit

from edgeattn.kernels_cpu.floats import ROWS
from edgeattn.kernels_cpu.steps import as_f32, i32_at

ARGS = ("q", "q.stride", "k", "k.stride", "v", "v.stride", "cos", "cos.stride", "sin", "out", "out.stride", "q.rows",
        "num_heads", "kv_heads", "head_dim", "rotary_dim", "interleaved", "scale", "window",
        "batch.positions", "batch.slots", "batch.row_starts", "batch.kv_lengths", "batch.page_tables", "batch.page_tables.stride",
        "batch.sequences", "cache.k", "cache.v", "cache.type", "cache.page_size",
        "selection.pages", "selection.counts", "selection.capacity", "workspace")
Call = namedtuple("Call", [name.replace(".", "_") for name in ARGS]
                  + ["tokens", "sequences", "threads", "group", "starts", "rotated", "keys", "partials", "scratch",
                     "scratch_size"])

SPLITS = 4           # decode tasks for each thread, so that a late thread costs little
CHUNK = 512          # tokens that decode scores before it weighs their values
KEYS = 128           # tokens that prefill scores at once
QUERIES = 96         # rows (query tokens x heads of a group) that prefill works on at once
DECODE_ROWS = 4      # query heads in decode's register tile
LOWEST_SCORE = np.float32(-3e38)  # finite, so that the difference of two is no NaN


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
    partials = (rows * kv_heads + threads * SPLITS) * group * (head_dim + 16)
    floats = (rows * heads + DECODE_ROWS) * head_dim + rows * kv_heads * head_dim + partials + threads * scratch_floats(head_dim, group)
    return 256 + 16 * (rows + 8) + 4 * floats


_scratch_floats = njit(nogil=True, error_model="numpy")(scratch_floats)


@njit(nogil=True, error_model="numpy")
def read_call(a, tokens, sequences, threads):
    """The arguments with the places of the workspace, by name. `a` is the step's row."""
    heads, kv_heads, head_dim = a[12], a[13], a[14]
    group = heads // kv_heads
    starts = a[33] + 64
    rotated = starts + 16 * (max(tokens, sequences) + 8) + 63
    rotated -= rotated % 64
    keys = rotated + 4 * (tokens * heads + DECODE_ROWS) * head_dim
    partials = keys + 4 * tokens * kv_heads * head_dim
    scratch = partials + 4 * (sequences * kv_heads + threads * SPLITS) * group * (head_dim + 16)
    return Call(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], heads, kv_heads, head_dim, a[15], a[16],
                as_f32(a[17]), a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27], a[28], a[29], a[30], a[31], a[32],
                a[33], tokens, sequences, threads, group, starts, rotated, keys, partials, scratch, _scratch_floats(head_dim, group))


@njit(nogil=True, error_model="numpy")
def rows_of(call, sequence):
    """(first row, rows, cached tokens) of a sequence; the rows are its newest tokens."""
    starts = i32_at(call.batch_row_starts, 1)
    first = np.int64(starts[sequence])
    return first, np.int64(starts[sequence + 1]) - first, np.int64(i32_at(call.batch_kv_lengths, 1)[sequence])


@njit(nogil=True, error_model="numpy")
def page_base(call, sequence, head, logical):
    """First element of a page of one KV head, the same in both pools."""
    physical = np.int64(i32_at(call.batch_page_tables, 1)[sequence * call.batch_page_tables_stride + logical])
    return (physical * call.kv_heads + head) * call.head_dim * call.cache_page_size


@njit(nogil=True, error_model="numpy")
def first_visible(call, position):
    """The first cached token that the token at `position` sees."""
    return max(0, position + 1 - call.window) if call.window > 0 else 0
