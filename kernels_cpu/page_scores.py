"""How much a decode step's query may ask of each page of one KV head: what select_pages chooses by.

    bound    q's product with the middle of the page's keys, channel by channel, and `reach` times the most that the keys' range can add to
             it: at reach 1 no key of the page scores higher (Quest, arXiv 2406.10774). The group's largest.
    recency  how new it is
    random   nothing
"""
import numpy as np
from numba import float32, int32, int64, njit, uint16, uint8

from edgeattn.kernels_cpu.attention_call import CALL, GROUP, HEAD_DIM, KV_HEADS, LAYER, MAX_PAGES, PAGE_TABLES, POOLS, WORKSPACE, slots_of
from edgeattn.kernels_cpu.attention_fold import OUT, SCORES, places
from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_pool import K_LEVELS, K_PARAMS, POOLS as POOL_COUNT, field_at, pool_of
from edgeattn.kernels_cpu.page_rows import HEAD_ROWS
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.selection_call import BOUND, REACH, RECENCY, SCORE, queries_at, scores_at
from edgeattn.kernels_cpu.simd import add_pairs, at, fma, load, load_half, max_pairs, prefetch, splat, store, vabs, vmax
from edgeattn.kernels_cpu.steps import as_f32

AHEAD = 8  # pages prefetched ahead


@njit(nogil=True, error_model="numpy")
def _bound_weights(q, group, depth, reach, heads, to):
    """[heads][2][depth] at `to`: what minima and steps are multiplied with."""
    for h in range(heads):
        source = min(h, group - 1) * depth  # beyond the group the last again, which changes no maximum
        for c in range(0, depth, 16):
            x = load(F, q, source + c)
            store(to, 2 * h * depth + c, x)
            store(to, (2 * h + 1) * depth + c, fma(vabs(x), splat(F, reach), x) * np.float32(0.5))


@njit(nogil=True, error_model="numpy")
def _bound(params, levels, weights, first, depth):
    """Products with the HEAD_ROWS query heads from `first` on, 4 lanes each, which are still to be summed."""
    w = 2 * first * depth
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = splat(F, np.float32(0))
    for c in range(0, depth, 16):
        low, step = load_half(F, params, c), load_half(F, params, depth + c)
        a0, b0 = fma(low, load(F, weights, w + c), a0), fma(step, load(F, weights, w + depth + c), b0)
        a1, b1 = fma(low, load(F, weights, w + 2 * depth + c), a1), fma(step, load(F, weights, w + 3 * depth + c), b1)
        a2, b2 = fma(low, load(F, weights, w + 4 * depth + c), a2), fma(step, load(F, weights, w + 5 * depth + c), b2)
        a3, b3 = fma(low, load(F, weights, w + 6 * depth + c), a3), fma(step, load(F, weights, w + 7 * depth + c), b3)
    m = splat(F, levels)
    return add_pairs(add_pairs(fma(b0, m, a0), fma(b1, m, a1)), add_pairs(fma(b2, m, a2), fma(b3, m, a3)))


@njit(nogil=True, error_model="numpy")
def _prefetch(address, size):
    for line in range(address, address + size, 64):
        prefetch(at(uint8, line), 0)


@njit(nogil=True, error_model="numpy")
def _range_of(call, entry, known):
    """(address of the halves that tell a page's range, levels between its ends); (0, 0) for a released page. known: what _pool_of_most
    gave, so that pages of one pool cost no look-up each."""
    kind, base, stride, levels = known
    if entry >= 0 and entry & (POOL_COUNT - 1) == kind:
        return base + (entry >> 2) * stride, levels
    if entry < 0:
        return np.int64(0), np.float32(0)
    pool = pool_of(call[POOLS], entry)
    return field_at(pool, K_PARAMS, entry), np.float32(pool[K_LEVELS])


@njit(nogil=True, error_model="numpy")
def _pool_of_most(call, entry):
    """(number, address of keys' parameters, bytes of a page's, levels) of an entry's pool."""
    pool = pool_of(call[POOLS], max(entry, 0))
    return max(entry, 0) & (POOL_COUNT - 1), pool[K_PARAMS], pool[K_PARAMS + 1], np.float32(pool[K_LEVELS])


@njit(nogil=True, error_model="numpy")
def _none_left(scores, first, last):
    for page in range(first, last):
        if scores[page] > -np.inf:
            return False
    return True


@njit(nogil=True, error_model="numpy")
def bound_scores(call, sequence, head, q, reach, rows, width, first, last, scores, thread, left_out):
    """rows: address of the head's index rows, `width` halves each; 0: quantised pages' own parameters tell their range. left_out: pages
    whose score is -infinity already keep it."""
    depth, group, place = call[HEAD_DIM], call[GROUP], places(call, thread)
    heads = (group + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS
    weights, found = at(float32, place[SCORES]), at(float32, place[OUT])  # a row of scores has CHUNK + 16 floats, more than 2 * depth
    _bound_weights(at(float32, q), group, depth, reach, heads, weights)
    zeros = place[OUT] + 64  # where a released page's range would be
    for c in range(0, 2 * depth, 16):
        store(at(float32, zeros), c // 2, splat(F, np.float32(0)))
    entries = at(int32, at(int64, call[PAGE_TABLES])[sequence] + 4 * (call[LAYER] * call[KV_HEADS] + head) * call[MAX_PAGES])
    known = _pool_of_most(call, np.int64(entries[first]))
    for page in range(first, last, 4):
        if left_out and _none_left(scores, page, min(page + 4, last)):
            continue
        best = splat(F, np.float32(-np.inf))
        if rows:
            step = 2 * width
            p0 = rows + page * step
            p1, p2 = rows + min(page + 1, last - 1) * step, rows + min(page + 2, last - 1) * step
            p3 = rows + min(page + 3, last - 1) * step
            m0 = m1 = m2 = m3 = np.float32(1)
            _prefetch(rows + (page + AHEAD) * step, 4 * step)
        else:
            p0, m0 = _range_of(call, np.int64(entries[page]), known)
            p1, m1 = _range_of(call, np.int64(entries[min(page + 1, last - 1)]), known)
            p2, m2 = _range_of(call, np.int64(entries[min(page + 2, last - 1)]), known)
            p3, m3 = _range_of(call, np.int64(entries[min(page + 3, last - 1)]), known)
            for ahead in range(page + AHEAD, min(page + AHEAD + 4, last)):
                _prefetch(_range_of(call, np.int64(entries[ahead]), known)[0], 4 * depth)
        for h in range(0, heads, HEAD_ROWS):
            low = add_pairs(_bound(at(uint16, p0 if p0 else zeros), m0, weights, h, depth),
                            _bound(at(uint16, p1 if p1 else zeros), m1, weights, h, depth))
            high = add_pairs(_bound(at(uint16, p2 if p2 else zeros), m2, weights, h, depth),
                             _bound(at(uint16, p3 if p3 else zeros), m3, weights, h, depth))
            best = vmax(best, add_pairs(low, high))  # lanes: page by page the four heads
        best = max_pairs(best, best)
        store(found, 0, max_pairs(best, best))
        for i in range(min(4, last - page)):
            gone = entries[page + i] < 0 or left_out and scores[page + i] == -np.inf
            scores[page + i] = np.float32(-np.inf) if gone else found[i]


@njit(nogil=True, error_model="numpy")
def random_scores(slots, head, first, last, scores):
    """Numbers that depend on the page, the head and how many tokens there are."""
    for page in range(first, last):
        x = (page * 2654435761 + head * 40503 + slots * 69621) & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 2246822519 & 0xFFFFFFFF
        scores[page] = np.float32((x ^ (x >> 13)) & 0xFFFFFF)


@worker
def score(a, begin, last, task, thread):
    """Scores of pages of one KV head of a sequence, which `task` is the number of."""
    call = at(int64, a[WORKSPACE] + CALL)
    sequence, head = task // call[KV_HEADS], task % call[KV_HEADS]
    scores = at(float32, scores_at(a, call, sequence, head))
    if a[SCORE] == BOUND:
        bound_scores(call, sequence, head, queries_at(call, sequence, head), as_f32(a[REACH]), 0, 0, begin, last, scores, thread, False)
    elif a[SCORE] == RECENCY:
        for page in range(begin, last):
            scores[page] = page
    else:
        random_scores(slots_of(call, sequence, head), head, begin, last, scores)
