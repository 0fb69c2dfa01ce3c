"""Which pages a decode step reads: scores of each KV head's pages (page_scores.py), and the best of them as lists (selections.py)."""
import numpy as np
from numba import carray, cfunc, float32, int32, int64, njit

from edgeattn.kernels_cpu import attention_call
from edgeattn.kernels_cpu.attention_call import (CALL, GROUP, HEAD_DIM, KEYS_ROTATION, KV_HEADS, LAYER, MAX_PAGES, NUM_HEADS, ROTATED,
                                                 ROWS_INDEX, SCRATCH, SCRATCH_SIZE, SELECTION_CAPACITY, SELECTION_GROUP, SELECTIONS,
                                                 SEQUENCES_INDEX, THREADS, WORKSPACE, make_call, rows_of, slots_of)
from edgeattn.kernels_cpu.attention_write import rotate_queries
from edgeattn.kernels_cpu.cached_attention import PagedCache, bind
from edgeattn.kernels_cpu.page_index import index_pages
from edgeattn.kernels_cpu.page_scores import bound_scores, mass_scores, random_scores
from edgeattn.kernels_cpu.page_scores_exact import HALF, max_mass_scores, note_softmax, peak_scores, rank_floats, rank_scores
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.selections import AGE, ALL, COUNT, HEADER, INTERVAL, SLOTS, list_at
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import CODES, STEP, as_f32, call as call_step, thread_count
from edgeattn.kernels_cpu.top_pages import top_pages
from edgeattn.page_formats import PAGE

ARGS = (*attention_call.ARGS, "batch.sealed", "batch.index", "batch.indexed", "selection.width", "selection.scores", "selection.shares",
        "selection.stats", "score", "combine", "budget", "fraction", "recent", "reach", "reuse", "cos.0")
(SEALED, INDEX, INDEXED, INDEX_WIDTH, PAGE_SCORES, SHARES, STATS, SCORE, COMBINE, BUDGET, FRACTION, RECENT, REACH, REUSE, COS_ROWS) = range(
    len(attention_call.ARGS), len(ARGS))
BOUND, MASS, RECENCY, RANDOM = (CODES[name] for name in ("bound", "mass", "recency", "random"))
PEAK, RANK, MAX_MASS = (CODES[name] for name in ("peak", "rank", "max_mass"))
ALONE, BEST = CODES["head"], CODES["best"]
LONGEST = 16  # steps that a list serves at most
SPARSE, DENSE, READ, HELD, REUSED, STATS_FIELDS = range(6)  # of a layer: (sequence, head) pairs, pages


def workspace_bytes(tensors, attributes, rows, threads):
    """What attention takes, and what ranking does."""
    found = attention_call.workspace_bytes(tensors, attributes, rows, threads)
    if attributes["score"] == "rank":
        pages = -(-tensors["cos"].shape[0] // PAGE)
        found += 4 * threads * rank_floats(int(attributes["num_heads"]) // int(attributes["kv_heads"]), pages)
    return found


def select_pages(q, cos, sin, past_key, positions, *, num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale, layer=0, capacity,
                 share=1.0, **options):
    cache = PagedCache([past_key], [past_key], [1])
    lists = np.zeros((1, kv_heads, HEADER + capacity), np.int32)
    nothing = np.zeros((1, kv_heads * head_dim), np.float32)
    about = dict(num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved, scale=scale)
    tensors, attributes, extra, _kept = bind(cache, q, nothing, nothing, cos, sin, positions, about | options, lists, capacity)
    state = {"batch.sealed": np.ones((1, kv_heads), np.int32), "batch.indexed": np.zeros((1, kv_heads), np.int32),
             "batch.index": np.zeros((1, kv_heads, cache.tables.shape[2], 2 * head_dim), np.uint16)}
    each = {name: np.array([array.ctypes.data], np.int64) for name, array in state.items()}
    each |= {"selection.scores": np.zeros((1, kv_heads, cache.tables.shape[2]), np.float32), "selection.shares": np.full(kv_heads, share, np.float32),
             "selection.stats": np.zeros(STATS_FIELDS, np.int64)}
    extra |= {name: array.ctypes.data for name, array in each.items()} | {"selection.width": 2 * head_dim}
    call_step(step, ARGS, tensors, attributes | {"reuse": 0.0}, extra, workspace_bytes)
    return lists[0, :, HEADER:], lists[0, :, COUNT]


@njit(nogil=True, error_model="numpy")
def _candidates(a, call, sequence, head, total):
    """(first, last) of the pages that scores decide about: those between the first page and the recent ones. Bounds without an index are
    those of quantised pages only."""
    sealed = np.int64(at(int32, at(int64, a[SEALED])[sequence])[call[LAYER] * call[KV_HEADS] + head])
    last = total - a[RECENT]
    if a[SCORE] == BOUND and (sealed > 1 or a[INDEX_WIDTH] == 0):
        last = min(last, sealed)
    return np.int64(1), max(np.int64(1), last)


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
    free = max(wanted - (total - last) - first, np.int64(0))
    follows = row[COUNT] >= 0 and row[SLOTS] + row[AGE] + 1 == slots
    row[AGE] = 0
    if wanted >= total or free >= last - first or total - last + first + free > call[SELECTION_CAPACITY] - 2:
        row[COUNT], row[SLOTS], row[INTERVAL] = ALL, slots, 1
        return
    old, old_count = at(int32, call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]), np.int64(row[COUNT])
    if as_f32(a[REUSE]) > 0 and follows:
        for i in range(old_count):
            old[i] = row[HEADER + i]
    row[HEADER] = 0
    if free:
        top_pages(_scores_at(a, call, sequence, head), first, last, free, row, HEADER + 1)
    for page in range(last, total):
        row[HEADER + 1 + free + page - last] = page
    row[COUNT], row[SLOTS] = 1 + free + total - last, slots
    interval = np.int64(1)
    if as_f32(a[REUSE]) > 0 and follows:
        kept = _overlap(at(int32, _list(a, call, sequence, head) + 4 * (HEADER + 1)), free, old, old_count)
        interval = min(2 * np.int64(row[INTERVAL]), LONGEST) if kept >= as_f32(a[REUSE]) else max(np.int64(row[INTERVAL]) // 2, np.int64(1))
    row[INTERVAL] = interval


@njit(nogil=True, error_model="numpy")
def _still_good(a, call, sequence, head, slots):
    """Whether a list made some steps ago serves this step too."""
    row = at(int32, _list(a, call, sequence, head))
    return row[COUNT] >= 1 and row[SLOTS] + row[AGE] + 1 == slots and row[AGE] + 1 < row[INTERVAL]


@njit(nogil=True, error_model="numpy")
def _use_again(a, call, sequence, head, total):
    """A list that is still good gets the page begun since."""
    row = at(int32, _list(a, call, sequence, head))
    row[AGE] += 1
    if row[HEADER + row[COUNT] - 1] < total - 1:
        row[HEADER + row[COUNT]] = total - 1
        row[COUNT] += 1


@njit(nogil=True, error_model="numpy")
def _all_still_good(a, call, sequence):
    good = True
    for head in range(call[KV_HEADS]):
        good = good and _still_good(a, call, sequence, head, slots_of(call, sequence, head))
    return good


@njit(nogil=True, error_model="numpy")
def _choosing_together(a, call, sequence):
    """Whether heads that choose together need scores: their lists are made anew, and some head reads only a part."""
    some = False
    for head in range(call[KV_HEADS]):
        slots = slots_of(call, sequence, head)
        some = some or _wanted(a, call, head, slots) < (slots + PAGE - 1) // PAGE
    return some and not _all_still_good(a, call, sequence)


@njit(nogil=True, error_model="numpy")
def _most_pages(a):
    """That a KV head can have: as many as the rotary tables have positions for."""
    return (a[COS_ROWS] + PAGE - 1) // PAGE


@worker
def select_head(a, rows, first, task, thread):
    """One KV head of a sequence: scores, and its list where heads choose for themselves."""
    call = at(int64, a[WORKSPACE] + CALL)
    sequence, head = task // call[KV_HEADS], task % call[KV_HEADS]
    if at(int64, call[SELECTIONS])[sequence] == 0:
        return
    slots = slots_of(call, sequence, head)
    total, wanted = (slots + PAGE - 1) // PAGE, _wanted(a, call, head, slots)
    if a[COMBINE] == ALONE and _still_good(a, call, sequence, head, slots):
        _use_again(a, call, sequence, head, total)
        return
    begin, last = _candidates(a, call, sequence, head, total)
    if wanted < total if a[COMBINE] == ALONE else _choosing_together(a, call, sequence):
        q = call[ROTATED] + 4 * (rows_of(call, sequence)[0] * call[NUM_HEADS] + head * call[GROUP]) * call[HEAD_DIM]
        found = _scores_at(a, call, sequence, head)
        scores = at(float32, found)
        if a[SCORE] == BOUND:
            index, lane, width = np.int64(0), call[LAYER] * call[KV_HEADS] + head, a[INDEX_WIDTH]
            if width:
                index = at(int64, a[INDEX])[sequence] + 2 * lane * call[MAX_PAGES] * width
                index_pages(call, sequence, head, last, index, width, at(int64, a[INDEXED])[sequence] + 4 * lane, thread)
            bound_scores(call, sequence, head, q, as_f32(a[REACH]), index, width, begin, last, scores, thread)
        elif a[SCORE] == MASS:
            mass_scores(call, sequence, head, q, slots - 1, total, scores, thread)
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
        _choose(a, call, sequence, head, wanted, slots, total, thread)


@worker
def score_part(a, parts, first, task, thread):
    """max_mass of some pages of a sequence, once the softmax of all heads is known."""
    call = at(int64, a[WORKSPACE] + CALL)
    sequence, part = task // parts, task % parts
    if at(int64, call[SELECTIONS])[sequence] == 0 or not _choosing_together(a, call, sequence):
        return
    slots, size = slots_of(call, sequence, 0), HALF // PAGE
    last = min((part + 1) * size, (slots + PAGE - 1) // PAGE)
    if part * size < last:
        max_mass_scores(call, sequence, part * size, last, slots - 1, at(float32, _scores_at(a, call, sequence, 0)), thread)
        for head in range(1, call[KV_HEADS]):
            scores = at(float32, _scores_at(a, call, sequence, head))
            for page in range(part * size, last):
                scores[page] = 0  # so that the sum over heads is the score


@njit(nogil=True, error_model="numpy")
def _choose_together(a, call, sequence):
    """All KV heads of the layer choose by the sum of their scores, or by the best of them."""
    slots = slots_of(call, sequence, 0)
    total = (slots + PAGE - 1) // PAGE
    if _all_still_good(a, call, sequence):
        for head in range(call[KV_HEADS]):
            _use_again(a, call, sequence, head, total)
        return
    for head in range(1, call[KV_HEADS]):
        sums, scores = at(float32, _scores_at(a, call, sequence, 0)), at(float32, _scores_at(a, call, sequence, head))
        for page in range(total):
            sums[page] = max(sums[page], scores[page]) if a[COMBINE] == BEST else sums[page] + scores[page]
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
            rotate_queries(call, rows_of(call, s)[0], call[KEYS_ROTATION] and a[SCORE] != BOUND)
    _run(select_head(), a, call, 0, sequences * call[KV_HEADS])
    if a[SCORE] == MAX_MASS:
        parts = np.int64(0)
        for s in range(sequences):
            parts = max(parts, (slots_of(call, s, 0) + HALF - 1) // HALF)
        _run(score_part(), a, call, parts, sequences * parts)
    for s in range(sequences):
        if selections[s]:
            if a[COMBINE] != ALONE:
                _choose_together(a, call, s)
            _count(a, call, s)
