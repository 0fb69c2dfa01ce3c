"""Which pages a decode step reads: scores of each KV head's pages (page_scores.py), and the best of them as lists (selections.py)."""
import numpy as np
from numba import carray, cfunc, float32, int32, int64, njit

from edgeattn.kernels_cpu import attention_call
from edgeattn.kernels_cpu.attention_call import (CALL, GROUP, HEAD_DIM, KEYS_ROTATION, KV_HEADS, LAYER, MAX_PAGES, NUM_HEADS, ROTATED,
                                                 ROWS_INDEX, SCRATCH, SCRATCH_SIZE, SELECTION_CAPACITY, SELECTION_GROUP, SELECTIONS,
                                                 SEQUENCES_INDEX, THREADS, WORKSPACE, make_call, rows_of, slots_of, workspace_bytes)
from edgeattn.kernels_cpu.attention_write import rotate_queries
from edgeattn.kernels_cpu.cached_attention import PagedCache, bind
from edgeattn.kernels_cpu.page_index import COLLISIONS, COMPONENT_SCORES, HIERARCHY, index_pages, index_width
from edgeattn.kernels_cpu.page_scores import bound_scores, mass_scores, random_scores
from edgeattn.kernels_cpu.page_scores_index import index_scores
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.selections import (AGE, ALL, COUNT, DENSE, HEADER, HELD, INTERVAL, READ, REUSED, SLOTS, SPARSE, STATS_FIELDS,
                                             list_at)
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import CODES, STEP, as_f32, call as call_step, thread_count
from edgeattn.kernels_cpu.top_pages import top_pages
from edgeattn.page_formats import PAGE

ARGS = (*attention_call.ARGS, "batch.sealed", "batch.index", "batch.indexed", "selection.width", "selection.scores", "selection.shares",
        "selection.stats", "score", "combine", "budget", "fraction", "recent", "reach", "reuse",
        "selection.components", "block", "blocks", "bits")
(SEALED, INDEX, INDEXED, INDEX_WIDTH, PAGE_SCORES, SHARES, STATS, SCORE, COMBINE, BUDGET, FRACTION, RECENT, REACH, REUSE,
 COMPONENTS, BLOCK, BLOCKS, BITS) = range(len(attention_call.ARGS), len(ARGS))
BOUND, MASS, RECENCY, RANDOM = (CODES[name] for name in ("bound", "mass", "recency", "random"))
INDEXES = {name: name for name in ("hierarchy", "representatives", "landmarks", "components", "collisions")}  # by score; else bounds
LAYER_WIDE = CODES["layer"]
LONGEST = 16  # steps that a list serves at most


def select_pages(q, cos, sin, past_key, positions, components=None, *, num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale, layer=0,
                 capacity, share=1.0, score, rank=0, tables=0, **options):
    width = index_width(INDEXES.get(score, "bounds"), head_dim, rank or tables or options.get("block", 0))
    cache = PagedCache([past_key], [past_key], [1])
    lists = np.zeros((1, kv_heads, HEADER + capacity), np.int32)
    nothing = np.zeros((1, kv_heads * head_dim), np.float32)
    about = dict(num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved, scale=scale)
    options |= {"score": score}
    tensors, attributes, extra, _kept = bind(cache, q, nothing, nothing, cos, sin, positions, about | options, lists, capacity)
    state = {"batch.sealed": np.ones((1, kv_heads), np.int32), "batch.indexed": np.zeros((1, kv_heads), np.int32),
             "batch.index": np.zeros((1, kv_heads, cache.tables.shape[2], width), np.uint16)}
    each = {name: np.array([array.ctypes.data], np.int64) for name, array in state.items()}
    each |= {"selection.scores": np.zeros((1, kv_heads, cache.tables.shape[2]), np.float32), "selection.shares": np.full(kv_heads, share, np.float32),
             "selection.stats": np.zeros(STATS_FIELDS, np.int64)}
    vectors = np.ascontiguousarray(components, np.float32) if components is not None else np.zeros(1, np.float32)
    extra |= {name: array.ctypes.data for name, array in each.items()} | {"selection.width": width, "selection.components": vectors.ctypes.data}
    call_step(step, ARGS, tensors, attributes | {"reuse": 0.0}, extra, workspace_bytes)
    return lists[0, :, HEADER:], lists[0, :, COUNT]


@njit(nogil=True, error_model="numpy")
def _candidates(a, call, sequence, head, total):
    """(first, last) of the pages that scores decide about: those between the first page and the recent ones; where blocks are chosen,
    whole ones between the first block and what is recent. Without an index of bounds only quantised pages have them."""
    sealed = np.int64(at(int32, at(int64, a[SEALED])[sequence])[call[LAYER] * call[KV_HEADS] + head])
    last = total - a[RECENT]
    if sealed > 1 or (a[SCORE] == BOUND or a[SCORE] == HIERARCHY) and a[INDEX_WIDTH] < 2 * call[HEAD_DIM]:
        last = min(last, sealed)
    block = max(a[BLOCK], np.int64(1))
    last = max(np.int64(1), last // block * block)
    return min(block, last), last


@njit(nogil=True, error_model="numpy")
def _wanted(a, call, head, slots):
    """How many pages a head may read; a negative share: all."""
    share = at(float32, a[SHARES])[call[LAYER] * call[KV_HEADS] + head]
    if share < 0:
        return np.int64(1) << 40
    return np.int64(np.ceil(share * max(np.float32(a[BUDGET]), as_f32(a[FRACTION]) * np.float32(slots)) / np.float32(PAGE)))


@njit(nogil=True, error_model="numpy")
def _list(a, call, sequence, head):
    return list_at(at(int64, call[SELECTIONS])[sequence], call[SELECTION_GROUP], call[KV_HEADS], call[SELECTION_CAPACITY], head)


@njit(nogil=True, error_model="numpy")
def _scores_at(a, call, sequence, head):
    return a[PAGE_SCORES] + 4 * (sequence * call[KV_HEADS] + head) * call[MAX_PAGES]


@njit(nogil=True, error_model="numpy")
def _possible(a, call, sequence, head, first, last):
    """Pages that a score of -infinity does not exclude."""
    count, scores = np.int64(0), at(float32, _scores_at(a, call, sequence, head))
    for page in range(first, last):
        count += scores[page] > -np.inf
    return count


@njit(nogil=True, error_model="numpy")
def _overlap(pages, count, old, old_count):
    """The part of one ascending list that is in another."""
    both, j = 0, 0
    for i in range(count):
        while j < old_count and old[j] < pages[i]:
            j += 1
        both += j < old_count and old[j] == pages[i]
    return np.float32(both) / np.float32(max(count, 1))


@njit(nogil=True, error_model="numpy")
def _choose(a, call, sequence, head, wanted, slots, total, thread):
    """Make the list anew."""
    row, (first, last) = at(int32, _list(a, call, sequence, head)), _candidates(a, call, sequence, head, total)
    free = max(wanted - (total - last) - first, np.int64(0)) // max(a[BLOCK], np.int64(1)) * max(a[BLOCK], np.int64(1))
    follows = row[COUNT] >= 0 and row[SLOTS] + row[AGE] + 1 == slots
    row[AGE] = 0
    if wanted >= total or free >= last - first or total - last + first + free > call[SELECTION_CAPACITY] - 2:
        row[COUNT], row[SLOTS], row[INTERVAL] = ALL, slots, 1
        return
    old, old_count = at(int32, call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]), np.int64(row[COUNT])
    if as_f32(a[REUSE]) > 0 and follows:
        for i in range(old_count):
            old[i] = row[HEADER + i]
    for page in range(first):
        row[HEADER + page] = page
    free = min(free, _possible(a, call, sequence, head, first, last))
    if free:
        top_pages(_scores_at(a, call, sequence, head), first, last, free, row, HEADER + first)
    for page in range(last, total):
        row[HEADER + first + free + page - last] = page
    row[COUNT], row[SLOTS] = first + free + total - last, slots
    interval = np.int64(1)
    if as_f32(a[REUSE]) > 0 and follows:
        kept = _overlap(at(int32, _list(a, call, sequence, head) + 4 * (HEADER + first)), free, old, old_count)
        interval = min(2 * np.int64(row[INTERVAL]), LONGEST) if kept >= as_f32(a[REUSE]) else max(np.int64(row[INTERVAL]) // 2, np.int64(1))
    row[INTERVAL] = interval


@njit(nogil=True, error_model="numpy")
def _still_good(a, call, sequence, head, slots, total):
    """Whether a list made some steps ago serves this step too; then a page begun since is added."""
    row = at(int32, _list(a, call, sequence, head))
    if row[COUNT] < 1 or row[SLOTS] + row[AGE] + 1 != slots or row[AGE] + 1 >= row[INTERVAL]:
        return False
    row[AGE] += 1
    if row[HEADER + row[COUNT] - 1] < total - 1:
        row[HEADER + row[COUNT]] = total - 1
        row[COUNT] += 1
    return True


@njit(nogil=True, error_model="numpy")
def _components(a, call, head):
    """Address of the vectors that keys are multiplied with for this index; 0 where there are none. Principal components are each KV head's
    own."""
    own = call[LAYER] * call[KV_HEADS] + head if a[SCORE] == COMPONENT_SCORES else 0
    return a[COMPONENTS] + 4 * own * call[HEAD_DIM] * call[HEAD_DIM] if a[COMPONENTS] else np.int64(0)


@njit(nogil=True, error_model="numpy")
def _index(a, call, sequence, head, last, thread):
    """Address of a head's index, complete up to page `last`; 0 where there is none."""
    lane, width = call[LAYER] * call[KV_HEADS] + head, a[INDEX_WIDTH]
    if width == 0:
        return np.int64(0)
    index = at(int64, a[INDEX])[sequence] + 2 * lane * call[MAX_PAGES] * width
    index_pages(call, sequence, head, last, a[SCORE], index, width, a[BLOCK], a[BITS], _components(a, call, head),
                at(int64, a[INDEXED])[sequence] + 4 * lane, thread)
    return index


@worker
def select_head(a, rows, first, task, thread):
    """One KV head of a sequence: scores, and its list where heads choose for themselves."""
    call = at(int64, a[WORKSPACE] + CALL)
    sequence, head = task // call[KV_HEADS], task % call[KV_HEADS]
    if at(int64, call[SELECTIONS])[sequence] == 0:
        return
    slots = slots_of(call, sequence, head)
    total, wanted = (slots + PAGE - 1) // PAGE, _wanted(a, call, head, slots)
    if _still_good(a, call, sequence, head, slots, total):
        return
    begin, last = _candidates(a, call, sequence, head, total)
    if wanted < total:
        q = call[ROTATED] + 4 * (rows_of(call, sequence)[0] * call[NUM_HEADS] + head * call[GROUP]) * call[HEAD_DIM]
        found = _scores_at(a, call, sequence, head)
        scores = at(float32, found)
        if a[SCORE] == BOUND:
            index, width = _index(a, call, sequence, head, last, thread), a[INDEX_WIDTH]
            bound_scores(call, sequence, head, q, as_f32(a[REACH]), index, width, begin, last, scores, thread, False)
        elif a[SCORE] == MASS:
            mass_scores(call, sequence, head, q, slots - 1, total, scores, thread)
        elif HIERARCHY <= a[SCORE] <= COLLISIONS:
            index = _index(a, call, sequence, head, last, thread)
            index_scores(call, sequence, head, a[SCORE], q, as_f32(a[REACH]), index, a[INDEX_WIDTH], _components(a, call, head),
                         max(a[BLOCK], np.int64(1)), a[BLOCKS], a[BITS], begin, last, found, thread)
        elif a[SCORE] == RECENCY:
            for page in range(begin, last):
                scores[page] = page
        else:
            random_scores(slots, head, begin, last, scores)
    if a[COMBINE] != LAYER_WIDE:
        _choose(a, call, sequence, head, wanted, slots, total, thread)


@njit(nogil=True, error_model="numpy")
def _choose_together(a, call, sequence):
    """All KV heads of the layer choose by the sum of their scores."""
    slots = slots_of(call, sequence, 0)
    total = (slots + PAGE - 1) // PAGE
    for head in range(1, call[KV_HEADS]):
        sums, scores = at(float32, _scores_at(a, call, sequence, 0)), at(float32, _scores_at(a, call, sequence, head))
        for page in range(total):
            sums[page] += scores[page]
    for head in range(call[KV_HEADS]):
        if head:
            sums, scores = at(float32, _scores_at(a, call, sequence, 0)), at(float32, _scores_at(a, call, sequence, head))
            for page in range(total):
                scores[page] = sums[page]
        _choose(a, call, sequence, head, _wanted(a, call, head, slots), slots, total, 0)


@njit(nogil=True, error_model="numpy")
def _count(a, call, sequence):
    """Add what this step reads to the layer's figures."""
    stats = at(int64, a[STATS] + 8 * STATS_FIELDS * call[LAYER])
    for head in range(call[KV_HEADS]):
        row, total = at(int32, _list(a, call, sequence, head)), (slots_of(call, sequence, head) + PAGE - 1) // PAGE
        dense = row[COUNT] == ALL
        stats[DENSE if dense else SPARSE] += 1
        stats[READ] += total if dense else np.int64(row[COUNT])
        stats[HELD] += total
        stats[REUSED] += row[AGE] > 0


@cfunc(STEP, cache=True)
def step(a, state):
    selections, sequences, some = at(int64, a[SELECTIONS]), state[a[SEQUENCES_INDEX]], False
    for s in range(sequences):
        some = some or selections[s] != 0
    if not some:  # every sequence reads everything
        return
    call = make_call(a, state[a[ROWS_INDEX]], sequences, 0, thread_count())
    for s in range(sequences):
        if selections[s]:
            rotate_queries(call, rows_of(call, s)[0], call[KEYS_ROTATION] and a[SCORE] == MASS)
    tasks = sequences * call[KV_HEADS]
    if call[THREADS] > 1 and tasks > 1:
        parallel(select_head(), carray(a, 1).ctypes.data, 0, 0, tasks)
    else:
        for task in range(tasks):
            call_worker(select_head(), carray(a, 1).ctypes.data, 0, 0, task, 0)
    for s in range(sequences):
        if selections[s]:
            if a[COMBINE] == LAYER_WIDE:
                _choose_together(a, call, s)
            _count(a, call, s)
