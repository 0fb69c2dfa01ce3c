"""Page scores from every key that the cache holds, for layers that read all of them and choose for the layers that follow.

    mass      the softmax weight of the page's tokens among all tokens, over the group's query heads: what a selection would know that had
              read every key
    peak      the largest product of a token's key with the sum of the group's queries (TidalDecode, arXiv 2410.05076)
    rank      how early the page is named when all query heads of the layer take turns to name the best page they have not named yet, a
              page being worth its best token: minus its place (LessIsMore, arXiv 2508.07101)
    max_mass  over the page's tokens the sum of the largest softmax weight that any query head of the layer gives (DELTA, arXiv 2510.09883)
"""
import numpy as np
from numba import float32, int32, int64, njit

from edgeattn.kernels_cpu.attention_call import (CALL, CHUNK, GROUP, KV_HEADS, NUM_HEADS, PAGE, PARTIALS, SCRATCH, SCRATCH_SIZE,
                                                 SELECTIONS, THREADS, WORKSPACE, entry_of, slots_of)
from edgeattn.kernels_cpu.attention_decode import hide, score_page
from edgeattn.kernels_cpu.attention_fold import OUT, SCORES, STRIDE, SUMS, TOPS, places, prepare_queries
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, soften
from edgeattn.kernels_cpu.floats import F, exp_low
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.selection_call import COS_ROWS, HALF, MASS, PEAK, RANK, SCORE, queries_at, rank_floats, scores_at, wanted_pages
from edgeattn.kernels_cpu.selection_choice import choosing_together
from edgeattn.kernels_cpu.simd import at, hmax, hsum, load, splat, store, vmax
from edgeattn.kernels_cpu.top_pages import top_pages

@njit(nogil=True, error_model="numpy")
def score_chunk(call, place, sequence, head, q, first, last, slots):
    """Scores of the pages first ... last with all query heads; -> slots that they have."""
    scores = at(float32, place[SCORES])
    for page in range(first, last):
        entry, to = entry_of(call, sequence, head, page), (page - first) * PAGE
        if entry < 0:
            hide(scores, call[GROUP], to, 0, 0, 0)
        else:
            score_page(call, place, entry, entry, q, False, to)
            hide(scores, call[GROUP], to, page * PAGE, 0, slots)
    return (last - first) * PAGE


@njit(nogil=True, error_model="numpy")
def softmax_of(call, place, sequence, head, q, slots, last):
    """Each query head's maximum and sums over the first `slots` tokens, which lie in `last` pages."""
    group = call[GROUP]
    scores, out, sums, tops = at(float32, place[SCORES]), at(float32, place[OUT]), at(float32, place[SUMS]), at(float32, place[TOPS])
    prepare_queries(call, place, q, True)
    for h in range(group):
        tops[h] = LOWEST_SCORE
        store(sums, 16 * h, splat(F, np.float32(0)))
    for first in range(0, last, CHUNK // PAGE):
        count = score_chunk(call, place, sequence, head, q, first, min(last, first + CHUNK // PAGE), slots)
        for h in range(group):
            soften(scores, h * STRIDE, h * STRIDE + count, tops, sums, h, out, 0, 0)


@njit(nogil=True, error_model="numpy")
def mass_scores(call, sequence, head, q, slots, last, found, thread):
    """The weights that the first `slots` tokens get, page by page of all `last`, by two reads of the keys."""
    place, group = places(call, thread), call[GROUP]
    scores, sums, tops = at(float32, place[SCORES]), at(float32, place[SUMS]), at(float32, place[TOPS])
    softmax_of(call, place, sequence, head, q, slots, last)
    for first in range(0, last, CHUNK // PAGE):
        end = min(last, first + CHUNK // PAGE)
        score_chunk(call, place, sequence, head, q, first, end, slots)
        for page in range(first, end):
            total = splat(F, np.float32(0))
            for h in range(group):
                share = np.float32(1) / hsum(load(F, sums, 16 * h))
                for i in range((page - first) * PAGE, (page - first + 1) * PAGE, 16):
                    total += exp_low(load(F, scores, h * STRIDE + i) - tops[h]) * share
            found[page] = hsum(total)


@njit(nogil=True, error_model="numpy")
def peak_scores(call, sequence, head, q, first, last, found, thread):
    place, scores = places(call, thread), at(float32, places(call, thread)[SCORES])
    prepare_queries(call, place, q, True)
    for begin in range(first, last, CHUNK // PAGE):
        end = min(last, begin + CHUNK // PAGE)
        score_chunk(call, place, sequence, head, q, begin, end, last * PAGE)
        for page in range(begin, end):
            best = splat(F, np.float32(-np.inf))
            for i in range((page - begin) * PAGE, (page - begin + 1) * PAGE, 16):
                total = load(F, scores, i)
                for h in range(1, call[GROUP]):
                    total += load(F, scores, h * STRIDE + i)
                best = vmax(best, total)
            found[page] = hmax(best)


# ---- rank ----------------------------------------------------------------------------------------------------------
_rank_floats = njit(nogil=True, error_model="numpy")(rank_floats)


@njit(nogil=True, error_model="numpy")
def _best_first(pages, count, scores):
    """Sort ascending page numbers by their scores, the highest first, of equals the lower page (Shell's sort, gaps of Knuth's)."""
    gap = 1
    while 3 * gap + 1 < count:
        gap = 3 * gap + 1
    while gap > 0:
        for i in range(gap, count):
            page, j = pages[i], i
            while j >= gap and (scores[pages[j - gap]] < scores[page] or scores[pages[j - gap]] == scores[page] and pages[j - gap] > page):
                pages[j] = pages[j - gap]
                j -= gap
            pages[j] = page
        gap //= 3


@njit(nogil=True, error_model="numpy")
def rank_scores(call, sequence, head, q, first, last, wanted, pages, found, thread):
    """wanted: no head names more pages. pages: as many as the memory behind all threads' scratch has room for."""
    place, group = places(call, thread), call[GROUP]
    scores, count = at(float32, place[SCORES]), min(wanted, last - first)
    memory = call[SCRATCH] + 4 * call[THREADS] * call[SCRATCH_SIZE] + 4 * thread * _rank_floats(group, pages)
    best, order = at(float32, memory), at(int32, memory + 4 * group * pages)
    prepare_queries(call, place, q, True)
    for begin in range(first, last, CHUNK // PAGE):
        end = min(last, begin + CHUNK // PAGE)
        score_chunk(call, place, sequence, head, q, begin, end, last * PAGE)
        for h in range(group):
            for page in range(begin, end):
                i = h * STRIDE + (page - begin) * PAGE
                best[h * pages + page] = hmax(vmax(load(F, scores, i), load(F, scores, i + 16)))
    for page in range(first, last):
        found[page] = -np.inf
    for h in range(group if count > 0 else 0):
        top_pages(memory + 4 * h * pages, first, last, count, order, 0)
        _best_first(order, count, at(float32, memory + 4 * h * pages))
        for i in range(count):
            place_in_turn = np.float32(i * call[NUM_HEADS] + head * group + h)
            found[order[i]] = max(found[order[i]], -place_in_turn)


# ---- max_mass ------------------------------------------------------------------------------------------------------
@njit(nogil=True, error_model="numpy")
def _softmax_at(call, sequence, head):
    """Each query head's maximum and 1 / sum, where decode's partial results will lie later."""
    return at(float32, call[PARTIALS] + 8 * (sequence * call[NUM_HEADS] + head * call[GROUP]))


@njit(nogil=True, error_model="numpy")
def note_softmax(call, sequence, head, q, slots, last, thread):
    """What max_mass_scores needs of one KV head's query heads before any weight is known."""
    place, kept = places(call, thread), _softmax_at(call, sequence, head)
    softmax_of(call, place, sequence, head, q, slots, last)
    for h in range(call[GROUP]):
        kept[2 * h], kept[2 * h + 1] = at(float32, place[TOPS])[h], np.float32(1) / hsum(load(F, at(float32, place[SUMS]), 16 * h))


@njit(nogil=True, error_model="numpy")
def max_mass_scores(call, sequence, first, last, slots, found, thread):
    """Pages first ... last, at most HALF tokens, for all KV heads together. The other half of a row of scores holds what is found."""
    place, group, count = places(call, thread), call[GROUP], (last - first) * PAGE
    scores = at(float32, place[SCORES])
    for i in range(HALF, HALF + count, 16):
        store(scores, i, splat(F, np.float32(0)))
    for head in range(call[KV_HEADS]):
        q, kept = queries_at(call, sequence, head), _softmax_at(call, sequence, head)
        prepare_queries(call, place, q, True)
        score_chunk(call, place, sequence, head, q, first, last, slots)
        for h in range(group):
            top, share = splat(F, kept[2 * h]), splat(F, kept[2 * h + 1])
            for i in range(0, count, 16):
                weight = exp_low(load(F, scores, h * STRIDE + i) - top) * share
                store(scores, HALF + i, vmax(load(F, scores, HALF + i), weight))
    for page in range(first, last):
        i = HALF + (page - first) * PAGE
        found[page] = hsum(load(F, scores, i) + load(F, scores, i + 16))


# ---- as select_pages calls them ------------------------------------------------------------------------------------
@worker
def score(a, begin, last, task, thread):
    """Scores of pages of one KV head of a sequence, which `task` is the number of; of max_mass the first half."""
    call = at(int64, a[WORKSPACE] + CALL)
    sequence, head = task // call[KV_HEADS], task % call[KV_HEADS]
    q, found, slots = queries_at(call, sequence, head), at(float32, scores_at(a, call, sequence, head)), slots_of(call, sequence, head)
    total = (slots + PAGE - 1) // PAGE
    if a[SCORE] == MASS:
        mass_scores(call, sequence, head, q, slots - 1, total, found, thread)
    elif a[SCORE] == PEAK:
        peak_scores(call, sequence, head, q, begin, last, found, thread)
    elif a[SCORE] == RANK:
        most = (a[COS_ROWS] + PAGE - 1) // PAGE  # pages that a KV head can have: as many as the rotary tables have positions for
        rank_scores(call, sequence, head, q, begin, last, wanted_pages(a, call, head, slots) - begin - (total - last), most, found, thread)
    else:
        note_softmax(call, sequence, head, q, slots - 1, total, thread)


@worker
def finish(a, parts, first, task, thread):
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
