"""Page scores from every key that the cache holds, for layers that read all of them and choose for the layers that follow.

    peak      the largest product of a token's key with the sum of the group's queries (TidalDecode, arXiv 2410.05076)
    rank      how early the page is named when all query heads of the layer take turns to name the best page they have not named yet, a
              page being worth its best token: minus its place (LessIsMore, arXiv 2508.07101)
    max_mass  over the page's tokens the sum of the largest softmax weight that any query head of the layer gives (DELTA, arXiv 2510.09883)
"""
import numpy as np
from numba import float32, int32, njit

from edgeattn.kernels_cpu.attention_call import (CHUNK, GROUP, HEAD_DIM, KV_HEADS, NUM_HEADS, PAGE, PARTIALS, ROTATED, SCRATCH, SCRATCH_SIZE,
                                                 THREADS, rows_of)
from edgeattn.kernels_cpu.attention_fold import SCORES, STRIDE, SUMS, TOPS, places, prepare_queries
from edgeattn.kernels_cpu.floats import F, exp_low
from edgeattn.kernels_cpu.page_scores import score_chunk, softmax_of
from edgeattn.kernels_cpu.simd import at, hmax, hsum, load, splat, store, vmax
from edgeattn.kernels_cpu.top_pages import top_pages

HALF = CHUNK // 2  # tokens that max_mass takes at once: the other half of a row of scores holds what it has found


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
def rank_floats(group: int, pages: int) -> int:
    """Of one thread: each query head's page scores, and an order of pages."""
    return (group + 1) * pages


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
    """Pages first ... last, at most HALF tokens, for all KV heads together."""
    place, group, count = places(call, thread), call[GROUP], (last - first) * PAGE
    scores = at(float32, place[SCORES])
    for i in range(HALF, HALF + count, 16):
        store(scores, i, splat(F, np.float32(0)))
    for head in range(call[KV_HEADS]):
        q = call[ROTATED] + 4 * (rows_of(call, sequence)[0] * call[NUM_HEADS] + head * group) * call[HEAD_DIM]
        kept = _softmax_at(call, sequence, head)
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
