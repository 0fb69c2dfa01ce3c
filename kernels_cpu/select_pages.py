"""Which pages a decode step reads: scores of each KV head's pages (page_scores.py), and the best of them as lists (selections.py)."""
import numpy as np
from numba import carray, cfunc, float32, int64, njit

from edgeattn.kernels_cpu import attention_call
from edgeattn.kernels_cpu.attention_call import (CALL, GROUP, HEAD_DIM, KEYS_ROTATION, KV_HEADS, LAYER, MAX_PAGES, NUM_HEADS, ROTATED,
                                                 ROWS_INDEX, SELECTIONS, SEQUENCES_INDEX, THREADS, WORKSPACE, make_call, rows_of, slots_of)
from edgeattn.kernels_cpu.attention_write import rotate_queries
from edgeattn.kernels_cpu.cached_attention import PagedCache, bind
from edgeattn.kernels_cpu.page_index import COLLISIONS, COMPONENT_SCORES, HIERARCHY, index_pages, index_width
from edgeattn.kernels_cpu.page_scores import bound_scores, mass_scores, random_scores
from edgeattn.kernels_cpu.page_scores_exact import HALF, max_mass_scores, note_softmax, peak_scores, rank_floats, rank_scores
from edgeattn.kernels_cpu.page_scores_index import index_scores
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.selection_call import (ALONE, ARGS, BITS, BLOCK, BLOCKS, BOUND, COMBINE, COMPONENTS, COS_ROWS, INDEX, INDEX_WIDTH,
                                                 INDEXED, MASS, MAX_MASS, PEAK, RANK, REACH, RECENCY, SCORE, candidates, scores_at, wanted_pages)
from edgeattn.kernels_cpu.selection_choice import choose, choose_together, choosing_together, count_reads, still_good, use_again
from edgeattn.kernels_cpu.selections import COUNT, HEADER, STATS_FIELDS
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import STEP, as_f32, call as call_step, thread_count
from edgeattn.page_formats import PAGE

INDEXES = {name: name for name in ("hierarchy", "representatives", "landmarks", "components", "collisions")}  # by score; else bounds


def workspace_bytes(tensors, attributes, rows, threads):
    """What attention takes, and what ranking does."""
    found = attention_call.workspace_bytes(tensors, attributes, rows, threads)
    if attributes["score"] == "rank":
        pages = -(-tensors["cos"].shape[0] // PAGE)
        found += 4 * threads * rank_floats(int(attributes["num_heads"]) // int(attributes["kv_heads"]), pages)
    return found


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
def _most_pages(a):
    """That a KV head can have: as many as the rotary tables have positions for."""
    return (a[COS_ROWS] + PAGE - 1) // PAGE


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
    total, wanted = (slots + PAGE - 1) // PAGE, wanted_pages(a, call, head, slots)
    if a[COMBINE] == ALONE and still_good(a, call, sequence, head, slots):
        use_again(a, call, sequence, head, total)
        return
    begin, last = candidates(a, call, sequence, head, total)
    if wanted < total if a[COMBINE] == ALONE else choosing_together(a, call, sequence):
        q = call[ROTATED] + 4 * (rows_of(call, sequence)[0] * call[NUM_HEADS] + head * call[GROUP]) * call[HEAD_DIM]
        found = scores_at(a, call, sequence, head)
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
        elif a[SCORE] == PEAK:
            peak_scores(call, sequence, head, q, begin, last, scores, thread)
        elif a[SCORE] == RANK:
            rank_scores(call, sequence, head, q, begin, last, wanted - begin - (total - last), _most_pages(a), scores, thread)
        elif a[SCORE] == MAX_MASS:
            note_softmax(call, sequence, head, q, slots - 1, total, thread)
        else:
            random_scores(slots, head, begin, last, scores)
    if a[COMBINE] == ALONE:
        choose(a, call, sequence, head, wanted, slots, total, thread)


@worker
def score_part(a, parts, first, task, thread):
    """max_mass of some pages of a sequence, once the softmax of all heads is known."""
    call = at(int64, a[WORKSPACE] + CALL)
    sequence, part = task // parts, task % parts
    if at(int64, call[SELECTIONS])[sequence] == 0 or not choosing_together(a, call, sequence):
        return
    slots, size = slots_of(call, sequence, 0), HALF // PAGE
    last = min((part + 1) * size, (slots + PAGE - 1) // PAGE)
    if part * size < last:
        max_mass_scores(call, sequence, part * size, last, slots - 1, at(float32, scores_at(a, call, sequence, 0)), thread)
        for head in range(1, call[KV_HEADS]):
            scores = at(float32, scores_at(a, call, sequence, head))
            for page in range(part * size, last):
                scores[page] = 0  # so that the sum over heads is the score


@njit(nogil=True, error_model="numpy")
def _run(address, a, call, rows, tasks):
    if call[THREADS] > 1 and tasks > 1:
        parallel(address, carray(a, 1).ctypes.data, rows, 0, tasks)
    else:
        for task in range(tasks):
            call_worker(address, carray(a, 1).ctypes.data, rows, 0, task, 0)


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
            exact = a[SCORE] == MASS or a[SCORE] >= PEAK  # by the keys themselves, as the cache rotates them
            rotate_queries(call, rows_of(call, s)[0], call[KEYS_ROTATION] and exact)
    _run(select_head(), a, call, 0, sequences * call[KV_HEADS])
    if a[SCORE] == MAX_MASS:
        parts = np.int64(0)
        for s in range(sequences):
            parts = max(parts, (slots_of(call, s, 0) + HALF - 1) // HALF)
        _run(score_part(), a, call, parts, sequences * parts)
    for s in range(sequences):
        if selections[s]:
            if a[COMBINE] != ALONE:
                choose_together(a, call, s)
            count_reads(a, call, s)
