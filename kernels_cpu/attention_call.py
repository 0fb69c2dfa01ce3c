"""One call of cached_attention: its arguments by name, where its scratch memory lies, and how pages are addressed.

Pages hold 32 tokens of one KV head of one layer (layouts: page_formats.py). For each sequence of the batch, layer and KV head there are
a list of pages (entries of the pools, page_pool.py) and a count of slots: cached tokens, the new ones included, in all pages from
the first on. Slot and position are the same until tokens are evicted.
"""
import numpy as np
from numba import int32, int64, njit

from edgeattn.kernels_cpu.float_tiles import ROWS
from edgeattn.kernels_cpu.page_rows import HEAD_ROWS, TASK_FIELDS
from edgeattn.kernels_cpu.simd import at
from edgeattn.page_formats import PAGE  # noqa: F401  all of attention takes it from here

ARGS = ("q", "q.stride", "k", "k.stride", "v", "v.stride", "cos", "cos.stride", "sin", "out", "out.stride", "q.rows",
        "num_heads", "kv_heads", "head_dim", "rotary_dim", "interleaved", "scale", "window", "layer",
        "batch.positions", "batch.row_starts", "batch.page_tables", "batch.slot_counts", "batch.attention_mass", "batch.compensation",
        "batch.confidence", "batch.sequences", "batch.probes", "cache.pools", "cache.max_pages", "cache.keys_rotated", "cache.mass_mode",
        "cache.mass_plane", "cache.progressive",
        "prefill.attend", "prefill.attend_listed", "batch.prefill_lists", "batch.selections", "selection.group",
        "selection.capacity", "selection.thresholds", "batch.value_sums", "workspace")
# The call: these arguments and what follows from them, as int64 in the workspace, for all threads.
(Q, Q_STRIDE, K, K_STRIDE, V, V_STRIDE, COS, COS_STRIDE, SIN, OUT, OUT_STRIDE, ROWS_INDEX, NUM_HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM,
 INTERLEAVED, SCALE, WINDOW, LAYER, POSITIONS, ROW_STARTS, PAGE_TABLES, SLOT_COUNTS, MASS, COMPENSATION, CONFIDENCE, SEQUENCES_INDEX,
 PROBES_INDEX, POOLS, MAX_PAGES, KEYS_ROTATION, MASS_MODE, MASS_PLANE, PROGRESSIVE, PREFILL, PREFILL_LISTED, PREFILL_LISTS, SELECTIONS,
 SELECTION_GROUP, SELECTION_CAPACITY, THRESHOLDS, VALUE_SUMS, WORKSPACE) = range(len(ARGS))
(TOKENS, SEQUENCES, THREADS, GROUP, STARTS, ROTATED, KEYS_ROTATED, PARTIALS, SCRATCH, SCRATCH_SIZE, PREFILL_TASKS, TASKS, RANGE_PAGES,
 WIDTH, PROBES, FIELDS) = range(len(ARGS), len(ARGS) + 16)
COUNTER, CALL = 0, 64  # byte offsets in the workspace: the next task; the call

SPLITS = 4           # decode tasks for each thread, so that a late thread costs little
CHUNK = 512          # tokens that decode scores before it weighs their values
KEYS = 128           # tokens that prefill scores at once
QUERIES = 256        # rows (query tokens x heads of a group) that prefill works on at once
LISTED = 64          # query tokens that do, where a list says what they read (edgeattn/prefill_plan.py, QUERIES)
# Such a list begins with int32 words: what makes good what is not read; a float32, by how many powers of 2 the largest of KEYS weights must
# lie below a row's largest so far for them to be left out; two for the address of mean keys and values [kv_heads, max_pages, head_dim +
# width].
CORRECTION, SKIP, MEANS, LIST_HEADER = 0, 1, 2, 4
NONE, TAIL, DELTA = range(3)
PLACE = TASK_FIELDS * 8 + 56  # bytes at the start of a thread's scratch: the task of page_rows


def scratch_floats(head_dim: int, group: int) -> int:
    """Floats of one thread: what a prefill task or a decode task needs, whichever is more."""
    width = -(-head_dim // 32) * 32
    rows = (max(1, QUERIES // group) * group + ROWS - 1) // ROWS * ROWS
    prefill = KEYS * (head_dim + width) + rows * (2 * head_dim + 32) + ROWS * (KEYS + 16) + 4 * width + 128
    heads = -(-group // HEAD_ROWS) * HEAD_ROWS
    decode = heads * (CHUNK + 16 + 4 * width + 80) + 256  # attention_fold.places
    rows = -(-max(LISTED * group, rows) // ROWS) * ROWS
    int8 = KEYS * (head_dim + width) // 4 + 2 * PAGE * (head_dim + width) + 4 * width + rows * (head_dim // 4 + width + 20)
    int8 += ROWS * (KEYS + 16 + KEYS // 4 + 4) + 4 * KEYS + head_dim + 640
    return 32 + -(-max(prefill, int8, decode) // 16) * 16


def workspace_bytes(tensors, attributes, rows, threads):
    """Task counter and table, rotated q and k, partial results of decode, scratch of each thread."""
    heads, kv_heads, head_dim = (int(attributes[name]) for name in ("num_heads", "kv_heads", "head_dim"))
    group = heads // kv_heads
    partials = (rows * kv_heads + threads * SPLITS) * group * (head_dim + 16)  # as many ranges as count_tasks makes at most
    floats = (rows * heads + HEAD_ROWS) * head_dim + rows * kv_heads * head_dim + partials + threads * scratch_floats(head_dim, group)
    return 1024 + 16 * (rows + 8) + 4 * floats


_scratch_floats = njit(nogil=True, error_model="numpy")(scratch_floats)


@njit(nogil=True, error_model="numpy")
def make_call(a, tokens, sequences, probes, threads):
    """Write the call, from the step's row of arguments, to the workspace."""
    call = at(int64, a[WORKSPACE] + CALL)
    for i in range(FIELDS):
        call[i] = a[i] if i <= WORKSPACE else 0
    heads, kv_heads, depth = a[NUM_HEADS], a[KV_HEADS], a[HEAD_DIM]
    group = heads // kv_heads
    call[TOKENS], call[SEQUENCES], call[THREADS], call[GROUP], call[PROBES] = tokens, sequences, threads, group, probes
    call[WIDTH] = (depth + 31) // 32 * 32
    call[STARTS] = a[WORKSPACE] + CALL + 8 * FIELDS
    call[ROTATED] = (call[STARTS] + 16 * (max(tokens, sequences) + 8) + 63) // 64 * 64
    call[KEYS_ROTATED] = call[ROTATED] + 4 * (tokens * heads + HEAD_ROWS) * depth
    call[PARTIALS] = call[KEYS_ROTATED] + 4 * tokens * kv_heads * depth
    call[SCRATCH] = call[PARTIALS] + 4 * (sequences * kv_heads + threads * SPLITS) * group * (depth + 16)
    call[SCRATCH_SIZE] = _scratch_floats(depth, group)
    return call


@njit(nogil=True, error_model="numpy")
def rows_of(call, sequence):
    """(first row, rows) of a sequence; the rows are its newest tokens."""
    starts = at(int32, call[ROW_STARTS])
    first = np.int64(starts[sequence])
    return first, np.int64(starts[sequence + 1]) - first


@njit(nogil=True, error_model="numpy")
def slots_of(call, sequence, head):
    """How many tokens a KV head of this layer holds, the new ones included."""
    return np.int64(at(int32, at(int64, call[SLOT_COUNTS])[sequence])[call[LAYER] * call[KV_HEADS] + head])


@njit(nogil=True, error_model="numpy")
def entry_of(call, sequence, head, page):
    """The entry of a logical page of this layer."""
    table = at(int32, at(int64, call[PAGE_TABLES])[sequence])
    return np.int64(table[(call[LAYER] * call[KV_HEADS] + head) * call[MAX_PAGES] + page])


@njit(nogil=True, error_model="numpy")
def first_visible(call, slot):
    """The first slot that the token in `slot` sees."""
    return max(0, slot + 1 - call[WINDOW]) if call[WINDOW] > 0 else 0


@njit(nogil=True, error_model="numpy")
def block_tokens(call, sequence):
    """Query tokens of a prefill task: those that one list is for, or as many as make QUERIES rows."""
    return LISTED if at(int64, call[PREFILL_LISTS])[sequence] else max(np.int64(1), QUERIES // call[GROUP])


@njit(nogil=True, error_model="numpy")
def query_blocks(call, sequence, rows):
    """How many prefill tasks `rows` new tokens make for each KV head."""
    size = block_tokens(call, sequence)
    return (rows + size - 1) // size
