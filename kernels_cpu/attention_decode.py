"""Decode attention: one query token of a sequence against a range of its pages, for all query heads of one KV head.

Each page is read once, and codes are read as they are: what a quantised page needs of its parameters is folded into q (keys by
channel) or into the softmax weights (values by token). CHUNK tokens are scored, then their values weighed (an online softmax between
chunks), while the pages that come next are prefetched. Ranges of one sequence are merged at the end (flash decoding).
"""
import numpy as np
from numba import float32, int32, int64, njit, uint16, uint8

from edgeattn.kernels_cpu.attention_call import (CHUNK, CONFIDENCE, GROUP, HEAD_DIM, KV_HEADS, LAYER, NUM_HEADS, OUT as RESULT, OUT_STRIDE,
                                                 PAGE, PARTIALS, POOLS, PROGRESSIVE, RANGE_PAGES, ROTATED, SEQUENCES, STARTS, WIDTH,
                                                 entry_of, first_visible, rows_of, slots_of)
from edgeattn.kernels_cpu.attention_compensation import compensation_of
from edgeattn.kernels_cpu.attention_fold import (BYTES, DROPPED, OUT, PEAKS, PRODUCTS, SCALES, SCORES, STRIDE, SUMS, TASK, TOKEN_BASES,
                                                 TOKEN_BYTES, TOKEN_SCALES, TOKEN_SUMS, TOPS, block_bytes, block_scales, fold_keys,
                                                 fold_weights, places, prepare_queries)
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, soften
from edgeattn.kernels_cpu.attention_thresholds import add_mean, note_dropped, passing_pages, thresholds_of
from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_pool import (BY_ROW, BY_TOKEN, GROUPS, K as K_CODES, K_ADD, K_AXIS, K_BYTES, K_GAP, K_LEVELS,
                                            K_PARAMS, K_ROW, K_TWO_PLANES, SEPARATED, V as V_CODES, V_ADD, V_BLOCK, V_BYTES, V_GAP,
                                            V_LEVELS, V_PARAMS, V_QUANTISED, field_at, pool_of)
from edgeattn.kernels_cpu.page_rows import (AHEAD_STEP, COARSE, GAP, HEAD_ROWS, HEADS, OUT_STRIDE as TASK_OUT, ROWS, SCALES as TASK_SCALES,
                                            WEIGHT_STRIDE)
from edgeattn.kernels_cpu.parallel import call_worker, worker
from edgeattn.kernels_cpu.selections import COUNT, HEADER, list_of
from edgeattn.kernels_cpu.simd import at, fma, hmax, hsum, load, load_half, prefetch, splat, store, vmax
from edgeattn.kernels_cpu.steps import as_f32

AHEAD = 6             # pages prefetched ahead


@njit(nogil=True, error_model="numpy")
def visible_pages(call, sequence, head):
    """(first logical page, how many) that a decode step reads; with a selection the list's length."""
    pages = list_of(call, sequence, head)
    if pages:
        return np.int64(0), np.int64(at(int32, pages)[COUNT])
    slots = slots_of(call, sequence, head)
    first = first_visible(call, slots - 1) // PAGE
    return first, (slots + PAGE - 1) // PAGE - first


@njit(nogil=True, error_model="numpy")
def _page(call, row, i):
    """(entry, logical page) of the i-th page read."""
    sequence, head, _, pages, _ = row
    if pages:
        i = np.int64(at(int32, pages)[HEADER + i])
    return entry_of(call, sequence, head, i), i


@njit(nogil=True, error_model="numpy")
def _score_by_token(call, place, pool, codes, params, heads, unread, at_score, ahead):
    """Keys by token: each group of channels is summed, then scaled by its tokens' steps."""
    depth, group, task = call[HEAD_DIM], call[GROUP], at(int64, place[TASK])
    p, scores, sums, size = at(uint16, params), at(float32, place[SCORES]), at(float32, place[PRODUCTS]), depth if pool[GROUPS] == 1 else 32
    bases, totals = at(float32, place[TOKEN_BASES]), at(float32, place[TOKEN_SUMS])
    scales, mean = at(float32, place[TOKEN_SCALES]), np.float32(pool[K_LEVELS]) * np.float32(0.5)
    back = mean - unread
    task[TASK_OUT], task[WEIGHT_STRIDE], task[TASK_SCALES] = 32, 4 * depth, place[TOKEN_SCALES]
    for h in range(group):
        for t in range(0, 32, 16):
            store(scores, h * STRIDE + at_score + t, splat(F, np.float32(0)))
    for d in range(0, depth, size):
        task[ROWS], task[GAP], first = min(size, depth - d), pool[K_GAP] - (4 * d if pool[K_LEVELS] == 7 else 0), d // size * 64
        for h in range(heads):
            base = total = np.float32(0)
            for g in range(d // 32, (d + task[ROWS] + 31) // 32):
                base += bases[g * heads + h]
                total += totals[g * heads + h]
            start = splat(F, mean * total - back * base * scales[h])
            store(sums, 32 * h, start)
            store(sums, 32 * h + 16, start)
        call_worker(pool[K_ADD], place[TASK], codes + d * pool[K_ROW], place[TOKEN_BYTES] + 4 * d, place[PRODUCTS], ahead)
        for h in range(group):
            total = np.float32(0)
            for g in range(d // 32, (d + task[ROWS] + 31) // 32):
                total += totals[g * heads + h]
            for t in range(0, 32, 16):
                to = h * STRIDE + at_score + t
                y = fma(load(F, sums, 32 * h + t), load_half(F, p, first + 32 + t), load_half(F, p, first + t) * total)
                store(scores, to, load(F, scores, to) + y)


@njit(nogil=True, error_model="numpy")
def _prefetch_params(pool, field, entry):
    start = field_at(pool, field, entry)
    for line in range(start, start + pool[field + 1], 64):
        prefetch(at(uint8, line), 0)


@njit(nogil=True, error_model="numpy")
def score_page(call, place, entry, ahead_entry, q, coarse, at_score):
    """Scores of one page's 32 slots, all query heads of the group; `q` is the address of the group's rotated queries, for which
    prepare_queries was called. coarse: of codes in two planes only the first is read, and the mean stands for the other."""
    depth, group, task, scores = call[HEAD_DIM], call[GROUP], at(int64, place[TASK]), at(float32, place[SCORES])
    heads = (group + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS
    pool, ahead_pool = pool_of(call[POOLS], entry), pool_of(call[POOLS], ahead_entry)
    codes, params, ahead = field_at(pool, K_CODES, entry), field_at(pool, K_PARAMS, entry), field_at(ahead_pool, K_CODES, ahead_entry)
    task[ROWS], task[GAP], task[HEADS], task[TASK_OUT] = depth, pool[K_GAP], heads, STRIDE
    steps = depth if pool[K_AXIS] == 0 else depth // 4
    task[AHEAD_STEP] = ahead_pool[K_BYTES] // steps
    coarse = coarse and pool[K_TWO_PLANES]
    task[COARSE], unread = coarse, np.float32(7.5 if coarse else 0)
    _prefetch_params(ahead_pool, K_PARAMS, ahead_entry)
    if pool[K_AXIS] == BY_TOKEN:
        _score_by_token(call, place, pool, codes, params, heads, unread, at_score, ahead)
        return
    weights = q
    if pool[K_AXIS] == BY_ROW:
        fold_keys(call, place, params, pool[K_LEVELS], unread, at_score)
        weights, task[WEIGHT_STRIDE], task[TASK_SCALES] = place[BYTES], 4 * depth, place[SCALES]
    else:
        for h in range(group):
            store(scores, h * STRIDE + at_score, splat(F, np.float32(0)))
            store(scores, h * STRIDE + at_score + 16, splat(F, np.float32(0)))
        task[WEIGHT_STRIDE] = depth
    call_worker(pool[K_ADD], place[TASK], codes, weights, place[SCORES] + 4 * at_score, ahead)


@njit(nogil=True, error_model="numpy")
def _weigh_separated(call, place, pool, codes, params, group_at, block, at_score, ahead):
    """Where channels have scales of their own, which differ from page to page: the page's sum first, then its share of the output."""
    width, p, part, out = call[WIDTH], at(uint16, params), at(float32, place[PRODUCTS]), at(float32, place[OUT])
    scales, task, stride = 64 * pool[GROUPS] + 32 * block, at(int64, place[TASK]), call[WIDTH] + call[WIDTH] // 2
    for h in range(call[GROUP]):
        store(part, 32 * h, splat(F, np.float32(0)))
    fold_weights(call, place, 0, params + 2 * group_at, pool[V_LEVELS], at_score, part, 0, 32)
    for h in range(call[GROUP]):
        base = splat(F, hsum(load(F, part, 32 * h)))
        store(part, 32 * h, base)
        store(part, 32 * h + 16, base)
    task[TASK_OUT] = 32
    call_worker(pool[V_ADD], place[TASK], codes, place[BYTES], place[PRODUCTS], ahead)
    for h in range(call[GROUP]):
        for c in range(0, 32, 16):
            to = h * stride + 32 * block + c
            store(out, to, fma(load(F, part, 32 * h + c), load_half(F, p, scales + c), load(F, out, to)))
    task[TASK_OUT] = width + width // 2


@njit(nogil=True, error_model="numpy")
def _weigh_page(call, place, entry, ahead_entry, count, at_score):
    """Add the weighted values of a page's first `count` slots; the others may never have been written."""
    task, out, width = at(int64, place[TASK]), at(float32, place[OUT]), call[WIDTH]
    pool, ahead_pool = pool_of(call[POOLS], entry), pool_of(call[POOLS], ahead_entry)
    codes, params, ahead = field_at(pool, V_CODES, entry), field_at(pool, V_PARAMS, entry), field_at(ahead_pool, V_CODES, ahead_entry)
    task[COARSE] = 0
    blocks, stride = width // 32, width + width // 2
    task[ROWS], task[GAP], task[TASK_OUT] = 32 if pool[V_QUANTISED] else count, pool[V_GAP], stride
    task[HEADS], task[TASK_SCALES] = (call[GROUP] + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS, place[SCALES]
    task[WEIGHT_STRIDE] = 128 if pool[V_QUANTISED] else STRIDE
    steps = 8 if pool[V_QUANTISED] else 32
    task[AHEAD_STEP] = ahead_pool[V_BYTES] // (steps * blocks)
    _prefetch_params(ahead_pool, V_PARAMS, ahead_entry)
    if pool[V_QUANTISED] and not pool[SEPARATED]:  # all blocks before the dots of any: short chains side by side
        for block in range(blocks):
            part = params + 2 * (block if pool[GROUPS] > 1 else 0) * 64
            fold_weights(call, place, block, part, pool[V_LEVELS], at_score, out, width + 16 * block, stride)
    for block in range(blocks):
        from_block, group_at = codes + block * pool[V_BLOCK], (block if pool[GROUPS] > 1 else 0) * 64
        soon = ahead + block * steps * task[AHEAD_STEP]
        if pool[SEPARATED]:
            _weigh_separated(call, place, pool, from_block, params, group_at, block, at_score, soon)
        elif pool[V_QUANTISED]:
            task[TASK_SCALES] = block_scales(call, place, block)
            call_worker(pool[V_ADD], place[TASK], from_block, block_bytes(call, place, block), place[OUT] + 128 * block, soon)
        else:
            call_worker(pool[V_ADD], place[TASK], from_block, place[SCORES] + 4 * at_score, place[OUT] + 128 * block, soon)


@njit(nogil=True, error_model="numpy")
def hide(scores, heads, to, start, low, high):
    """-inf for the slots of a page outside low ... high."""
    if start < low or start + PAGE > high:
        for t in range(PAGE):
            if start + t < low or start + t >= high:
                for h in range(heads):
                    scores[h * STRIDE + to + t] = -np.inf


@njit(nogil=True, error_model="numpy")
def _peaks(scores, group, count, peaks):
    """The highest score so far of each head."""
    for h in range(group):
        best = splat(F, peaks[h])
        for i in range(0, count, 16):
            best = vmax(best, load(F, scores, h * STRIDE + i))
        peaks[h] = hmax(best)


@njit(nogil=True, error_model="numpy")
def confidence_of(call, sequence, head):
    """Where a sequence keeps the largest attention weight of its last decode step, of the group's least certain query head: whether
    the next step may read keys coarsely (SpAtten's progressive reads, decided one step late)."""
    return at(float32, at(int64, call[CONFIDENCE])[sequence] + 4 * (call[LAYER] * call[KV_HEADS] + head))


@njit(nogil=True, error_model="numpy")
def _chunk(call, row, begin, end, last, low, high, coarse, place):
    """Pages begin ... end of the list, at most CHUNK tokens; the task ends at page `last`."""
    sequence, head, q_row, _, thresholds = row
    group, width = call[GROUP], call[WIDTH]
    scores, out, sums, tops = at(float32, place[SCORES]), at(float32, place[OUT]), at(float32, place[SUMS]), at(float32, place[TOPS])
    q = call[ROTATED] + 4 * (q_row * call[NUM_HEADS] + head * group) * call[HEAD_DIM]
    for i in range(begin, end):
        entry, logical = _page(call, row, i)
        to = (i - begin) * PAGE
        if entry < 0:  # released: nothing of it is left
            hide(scores, group, to, 0, 0, 0)
        else:
            ahead = _page(call, row, min(i + AHEAD, last - 1))[0]
            score_page(call, place, entry, ahead if ahead >= 0 else entry, q, coarse, to)
            hide(scores, group, to, logical * PAGE, low, high)
    count = (end - begin) * PAGE
    passing = passing_pages(call, place, thresholds, end - begin, high) if thresholds else np.int64(-1)
    if call[PROGRESSIVE]:
        _peaks(scores, group, count, at(float32, place[PEAKS]))
    for h in range(group):
        soften(scores, h * STRIDE, h * STRIDE + count, tops, sums, h, out, h * (width + width // 2), width + width // 2)
    if thresholds:
        note_dropped(call, place, passing, end - begin)
    for i in range(begin, end):
        entry, logical = _page(call, row, i)
        if entry >= 0 and passing >> (i - begin) & 1:
            soon = min(i + AHEAD, last - 1)
            ahead = _page(call, row, soon)[0] if passing == -1 or soon < end and passing >> (soon - begin) & 1 else -1
            _weigh_page(call, place, entry, ahead if ahead >= 0 else entry, min(PAGE, high - logical * PAGE), (i - begin) * PAGE)


@njit(nogil=True, error_model="numpy")
def partial_at(call, sequence, head, part, h):
    """First element of one query head's partial result."""
    task = at(int64, call[STARTS])[call[SEQUENCES] + 1 + sequence] + part * call[KV_HEADS] + head
    return (task * call[GROUP] + h) * (call[HEAD_DIM] + 16)


@worker
def attend_range(call, sequence, head, part, thread):
    """Range `part` of the pages that one KV head sees -> its partial [group, head_dim + 16]: weighted sum, maximum, sum."""
    depth, group, size, width = call[HEAD_DIM], call[GROUP], call[RANGE_PAGES], call[WIDTH]
    heads = (group + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS
    place = places(call, thread)
    out, sums, tops = at(float32, place[OUT]), at(float32, place[SUMS]), at(float32, place[TOPS])
    row = (sequence, head, rows_of(call, sequence)[0], list_of(call, sequence, head), thresholds_of(call, sequence, head))
    prepare_queries(call, place, call[ROTATED] + 4 * (row[2] * call[NUM_HEADS] + head * group) * depth, True)
    for i in range(heads * (width + width // 2 + 16)):  # sums follow
        out[i] = 0
    for h in range(heads):
        tops[h] = at(float32, place[PEAKS])[h] = LOWEST_SCORE
        at(float32, place[DROPPED])[8 * h] = 0
    coarse = call[PROGRESSIVE] != 0 and confidence_of(call, sequence, head)[0] >= as_f32(call[PROGRESSIVE])
    first, count = visible_pages(call, sequence, head)
    slots = slots_of(call, sequence, head)
    begin, last = first + part * size, first + min(count, (part + 1) * size)
    for i in range(begin, last, CHUNK // PAGE):
        _chunk(call, row, i, min(i + CHUNK // PAGE, last), last, first_visible(call, slots - 1), slots, coarse, place)
    partial = at(float32, call[PARTIALS])
    for h in range(group):
        to, source = partial_at(call, sequence, head, part, h), h * (width + width // 2)
        for c in range(0, depth, 16):
            rest = hsum(load(F, out, source + width + c // 32 * 16))
            store(partial, to + c, load(F, out, source + c) + rest)
        partial[to + depth], partial[to + depth + 1] = tops[h], hsum(load(F, sums, h * 16))
        partial[to + depth + 2], partial[to + depth + 3] = at(float32, place[PEAKS])[h], at(float32, place[DROPPED])[8 * h]


@worker
def merge_ranges(call, ranges, sequence, head, thread):
    """The output of one KV head's query heads from the partial results of all ranges."""
    depth = call[HEAD_DIM]
    row, _ = rows_of(call, sequence)
    partials, out, confidence = at(float32, call[PARTIALS]), at(float32, call[RESULT]), np.float32(1)
    for h in range(call[GROUP]):
        extra, weight, mean = compensation_of(call, sequence, head, row, h)
        top, total, peak, dropped = extra, np.float32(0), LOWEST_SCORE, np.float32(0)
        to = row * call[OUT_STRIDE] + (head * call[GROUP] + h) * depth
        for r in range(ranges):
            top = max(top, partials[partial_at(call, sequence, head, r, h) + depth])
        weight *= np.exp(extra - top)
        total += weight
        for c in range(0, depth, 16):
            store(out, to + c, splat(F, np.float32(0)) if weight == 0 else load(F, at(float32, mean), c) * weight)
        for r in range(ranges):
            start = partial_at(call, sequence, head, r, h)
            weight = np.exp(partials[start + depth] - top)
            total += weight * partials[start + depth + 1]
            dropped += weight * partials[start + depth + 3]
            peak = max(peak, partials[start + depth + 2])
            for c in range(0, depth, 16):
                store(out, to + c, load(F, out, to + c) + load(F, partials, start + c) * weight)
        if total > 0:
            confidence = min(confidence, np.exp(peak - top) / total)
            for c in range(0, depth, 16):
                store(out, to + c, load(F, out, to + c) * (np.float32(1) / total))
        if dropped > 0:
            add_mean(call, sequence, head, dropped / total, out, to)
    if call[PROGRESSIVE]:
        confidence_of(call, sequence, head)[0] = confidence
