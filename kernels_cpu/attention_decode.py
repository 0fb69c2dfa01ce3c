"""Decode attention: one query token of a sequence against a range of its pages, for all query heads of one KV head.

Each page is read once, and codes are read as they are: what a quantised page needs of its parameters is folded into q (keys by
channel) or into the softmax weights (values by token). CHUNK tokens are scored, then their values weighed (an online softmax between
chunks), while the pages that come next are prefetched. Ranges of one sequence are merged at the end (flash decoding).
"""
import numpy as np
from numba import float32, int32, int64, njit, uint16

from edgeattn.kernels_cpu.attention_call import (CHUNK, GROUP, HEAD_DIM, KV_HEADS, NUM_HEADS, OUT, OUT_STRIDE, PAGE, PARTIALS,
                                                 PLACE, POOLS, RANGE_PAGES, ROTATED, SCRATCH, SCRATCH_SIZE, SELECTED, SELECTED_CAPACITY,
                                                 SELECTED_COUNTS, SEQUENCES, STARTS, WIDTH, entry_of, first_visible, rows_of, slots_of)
from edgeattn.kernels_cpu.attention_compensation import compensation_of
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, soften
from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_pool import (BY_ROW, BY_TOKEN, GROUPS, K as K_CODES, K_ADD, K_AXIS, K_BYTES, K_GAP, K_PARAMS, K_ROW,
                                            SEPARATED, V as V_CODES, V_ADD, V_BLOCK, V_BYTES, V_GAP, V_PARAMS, V_QUANTISED, field_at, pool_of)
from edgeattn.kernels_cpu.page_rows import AHEAD_STEP, GAP, HEAD_ROWS, HEADS, OUT_STRIDE as TASK_OUT, ROWS, WEIGHT_STRIDE
from edgeattn.kernels_cpu.parallel import call_worker, worker
from edgeattn.kernels_cpu.simd import at, fma, hsum, load, load_half, splat, store

STRIDE = CHUNK + 16   # of a row of scores
AHEAD = 2             # pages prefetched ahead


@njit(nogil=True, error_model="numpy")
def visible_pages(call, sequence, head):
    """(first logical page, how many) that a decode step reads; with a selection the list's length."""
    if call[SELECTED]:
        return 0, np.int64(at(int32, call[SELECTED_COUNTS])[sequence * call[KV_HEADS] + head])
    slots = slots_of(call, sequence, head)
    first = first_visible(call, slots - 1) // PAGE
    return first, (slots + PAGE - 1) // PAGE - first


@njit(nogil=True, error_model="numpy")
def _page(call, row, i):
    """(entry, logical page) of the i-th page read."""
    sequence, head, _ = row
    if call[SELECTED]:
        i = np.int64(at(int32, call[SELECTED])[(sequence * call[KV_HEADS] + head) * call[SELECTED_CAPACITY] + i])
    return entry_of(call, sequence, head, i), i


@njit(nogil=True, error_model="numpy")
def places(call, thread):
    """Addresses in a thread's scratch: task, scores, weighted sums, sums of weights (16 lanes), maxima, folded rows, products with
    minima. A row of weighted sums is followed by WIDTH / 2 lanes: for each block of 32 channels 16 lanes of weights times minima."""
    start = call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]
    heads, width = (call[GROUP] + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS, call[WIDTH]
    scores = start + PLACE
    out = scores + 4 * heads * STRIDE
    sums = out + 4 * heads * (width + width // 2)
    tops = sums + 64 * heads
    folded = tops + 64 * heads // 16 * 4
    folded = (folded + 63) // 64 * 64
    return start, scores, out, sums, tops, folded, folded + 4 * heads * width


@njit(nogil=True, error_model="numpy")
def _fold_keys(call, params, q, folded, heads, scores, at_score):
    """Keys by channel: q * step becomes the rows' weights, and q . minimum each score's start."""
    depth, group, width = call[HEAD_DIM], call[GROUP], call[WIDTH]
    p, x, w = at(uint16, params), at(float32, q), at(float32, folded)
    for h in range(group):
        base = splat(F, np.float32(0))
        for d in range(0, depth, 16):
            part = load(F, x, h * depth + d)
            store(w, h * width + d, part * load_half(F, p, depth + d))
            base = fma(part, load_half(F, p, d), base)
        start = splat(F, hsum(base))
        store(scores, h * STRIDE + at_score, start)
        store(scores, h * STRIDE + at_score + 16, start)


@njit(nogil=True, error_model="numpy")
def _score_by_token(call, address, pool, codes, params, q, folded, heads, scores, at_score, ahead):
    """Keys by token: each group of channels is summed, then scaled by its tokens' steps."""
    depth, group, task = call[HEAD_DIM], call[GROUP], at(int64, address)
    p, x, sums, size = at(uint16, params), at(float32, q), at(float32, folded), depth if pool[GROUPS] == 1 else 32
    task[TASK_OUT], task[WEIGHT_STRIDE] = 32, depth
    for h in range(group):
        for t in range(0, 32, 16):
            store(scores, h * STRIDE + at_score + t, splat(F, np.float32(0)))
    for d in range(0, depth, size):
        task[ROWS], task[GAP], first = min(size, depth - d), pool[K_GAP] - 4 * d, d // size * 64
        for i in range(0, 32 * heads, 16):
            store(sums, i, splat(F, np.float32(0)))
        call_worker(pool[K_ADD], address, codes + d * pool[K_ROW], q + 4 * d, folded, ahead)
        for h in range(group):
            total = splat(F, np.float32(0))
            for c in range(d, d + task[ROWS], 16):
                total += load(F, x, h * depth + c)
            total = splat(F, hsum(total))
            for t in range(0, 32, 16):
                to = h * STRIDE + at_score + t
                y = fma(load(F, sums, 32 * h + t), load_half(F, p, first + 32 + t), load_half(F, p, first + t) * total)
                store(scores, to, load(F, scores, to) + y)


@njit(nogil=True, error_model="numpy")
def score_page(call, place, entry, ahead_entry, q, at_score):
    """Scores of one page's 32 slots, all query heads of the group; `q` is the address of the group's rotated queries."""
    start, score_address, _, _, _, folded, _ = place
    depth, group, task, scores = call[HEAD_DIM], call[GROUP], at(int64, start), at(float32, score_address)
    heads = (group + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS
    pool, ahead_pool = pool_of(call[POOLS], entry), pool_of(call[POOLS], ahead_entry)
    codes, params, ahead = field_at(pool, K_CODES, entry), field_at(pool, K_PARAMS, entry), field_at(ahead_pool, K_CODES, ahead_entry)
    task[ROWS], task[GAP], task[HEADS], task[TASK_OUT] = depth, pool[K_GAP], heads, STRIDE
    task[AHEAD_STEP] = ahead_pool[K_BYTES] // depth
    if pool[K_AXIS] == BY_TOKEN:
        _score_by_token(call, start, pool, codes, params, q, folded, heads, scores, at_score, ahead)
        return
    if pool[K_AXIS] == BY_ROW:
        _fold_keys(call, params, q, folded, heads, scores, at_score)
        task[WEIGHT_STRIDE] = call[WIDTH]
        call_worker(pool[K_ADD], start, codes, folded, score_address + 4 * at_score, ahead)
    else:
        for h in range(group):
            store(scores, h * STRIDE + at_score, splat(F, np.float32(0)))
            store(scores, h * STRIDE + at_score + 16, splat(F, np.float32(0)))
        task[WEIGHT_STRIDE] = depth
        call_worker(pool[K_ADD], start, codes, q, score_address + 4 * at_score, ahead)


@njit(nogil=True, error_model="numpy")
def _fold_weights(call, params, block, group_at, scores, at_score, folded, out, to):
    """Values by token: weight * step becomes the rows' weights; weights times minima are summed lane by lane behind the head's row."""
    width, p, w = call[WIDTH], at(uint16, params), at(float32, folded)
    for h in range(call[GROUP]):
        rest = h * (width + width // 2) + width + 16 * block
        total = load(F, out, rest)
        for t in range(0, 32, 16):
            x = load(F, scores, h * STRIDE + at_score + t)
            store(w, h * width + t, x * load_half(F, p, group_at + 32 + t))
            total = fma(x, load_half(F, p, group_at + t), total)
        store(out, rest, total)


@njit(nogil=True, error_model="numpy")
def _weigh_separated(call, address, pool, codes, params, block, scores, at_score, folded, sums, out, ahead):
    """The same where channels have scales of their own, which differ from page to page."""
    width, p, w, part = call[WIDTH], at(uint16, params), at(float32, folded), at(float32, sums)
    group_at, scales = (block if pool[GROUPS] > 1 else 0) * 64, 64 * pool[GROUPS] + 32 * block
    task = at(int64, address)
    task[TASK_OUT] = 32
    for h in range(call[GROUP]):
        base = splat(F, np.float32(0))
        for t in range(0, 32, 16):
            x = load(F, scores, h * STRIDE + at_score + t)
            store(w, h * width + t, x * load_half(F, p, group_at + 32 + t))
            base = fma(x, load_half(F, p, group_at + t), base)
        base = splat(F, hsum(base))
        store(part, 32 * h, base)
        store(part, 32 * h + 16, base)
    call_worker(pool[V_ADD], address, codes, folded, sums, ahead)
    for h in range(call[GROUP]):
        for c in range(0, 32, 16):
            to = h * (width + width // 2) + 32 * block + c
            store(out, to, fma(load(F, part, 32 * h + c), load_half(F, p, scales + c), load(F, out, to)))
    task[TASK_OUT] = width + width // 2


@njit(nogil=True, error_model="numpy")
def _weigh_page(call, place, entry, ahead_entry, count, at_score):
    """Add the weighted values of a page's first `count` slots; the others may never have been written."""
    start, score_address, out_address, _, _, folded, products = place
    task, scores, out, width = at(int64, start), at(float32, score_address), at(float32, out_address), call[WIDTH]
    pool, ahead_pool = pool_of(call[POOLS], entry), pool_of(call[POOLS], ahead_entry)
    codes, params, ahead = field_at(pool, V_CODES, entry), field_at(pool, V_PARAMS, entry), field_at(ahead_pool, V_CODES, ahead_entry)
    task[ROWS], task[GAP], task[TASK_OUT] = count, pool[V_GAP], width + width // 2
    task[HEADS] = (call[GROUP] + HEAD_ROWS - 1) // HEAD_ROWS * HEAD_ROWS
    blocks = width // 32
    task[AHEAD_STEP] = ahead_pool[V_BYTES] // (32 * blocks)
    task[WEIGHT_STRIDE] = width if pool[V_QUANTISED] else STRIDE
    for block in range(blocks):
        from_block = codes + block * pool[V_BLOCK]
        soon = ahead + block * 32 * task[AHEAD_STEP]
        if pool[SEPARATED]:
            _weigh_separated(call, start, pool, from_block, params, block, scores, at_score, folded, products, out, soon)
        elif pool[V_QUANTISED]:
            _fold_weights(call, params, block, (block if pool[GROUPS] > 1 else 0) * 64, scores, at_score, folded, out, 0)
            call_worker(pool[V_ADD], start, from_block, folded, out_address + 128 * block, soon)
        else:
            call_worker(pool[V_ADD], start, from_block, score_address + 4 * at_score, out_address + 128 * block, soon)


@njit(nogil=True, error_model="numpy")
def hide(scores, heads, to, start, low, high):
    """-inf for the slots of a page outside low ... high."""
    if start < low or start + PAGE > high:
        for t in range(PAGE):
            if start + t < low or start + t >= high:
                for h in range(heads):
                    scores[h * STRIDE + to + t] = -np.inf


@njit(nogil=True, error_model="numpy")
def _chunk(call, row, begin, end, last, low, high, place):
    """Pages begin ... end of the list, at most CHUNK tokens; the task ends at page `last`."""
    sequence, head, q_row = row
    group, width = call[GROUP], call[WIDTH]
    _, scores, out, sums, tops, _, _ = place
    scores, out, sums, tops = at(float32, scores), at(float32, out), at(float32, sums), at(float32, tops)
    q = call[ROTATED] + 4 * (q_row * call[NUM_HEADS] + head * group) * call[HEAD_DIM]
    for i in range(begin, end):
        entry, logical = _page(call, row, i)
        to = (i - begin) * PAGE
        if entry < 0:  # released: nothing of it is left
            hide(scores, group, to, 0, 0, 0)
        else:
            ahead = _page(call, row, min(i + AHEAD, last - 1))[0]
            score_page(call, place, entry, ahead if ahead >= 0 else entry, q, to)
            hide(scores, group, to, logical * PAGE, low, high)
    count = (end - begin) * PAGE
    for h in range(group):
        soften(scores, h * STRIDE, h * STRIDE + count, tops, sums, h, out, h * (width + width // 2), width + width // 2)
    for i in range(begin, end):
        entry, logical = _page(call, row, i)
        if entry >= 0:
            ahead = _page(call, row, min(i + AHEAD, last - 1))[0]
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
    out, sums, tops = at(float32, place[2]), at(float32, place[3]), at(float32, place[4])
    for i in range(heads * (width + width // 2 + 16)):  # sums follow
        out[i] = 0
    for h in range(heads):
        tops[h] = LOWEST_SCORE
    first, count = visible_pages(call, sequence, head)
    slots = slots_of(call, sequence, head)
    begin, last = first + part * size, first + min(count, (part + 1) * size)
    row = (sequence, head, rows_of(call, sequence)[0])
    for i in range(begin, last, CHUNK // PAGE):
        _chunk(call, row, i, min(i + CHUNK // PAGE, last), last, first_visible(call, slots - 1), slots, place)
    partial = at(float32, call[PARTIALS])
    for h in range(group):
        to, source = partial_at(call, sequence, head, part, h), h * (width + width // 2)
        for c in range(0, depth, 16):
            rest = hsum(load(F, out, source + width + c // 32 * 16))
            store(partial, to + c, load(F, out, source + c) + rest)
        partial[to + depth], partial[to + depth + 1] = tops[h], hsum(load(F, sums, h * 16))


@worker
def merge_ranges(call, ranges, sequence, head, thread):
    """The output of one KV head's query heads from the partial results of all ranges."""
    depth = call[HEAD_DIM]
    row, _ = rows_of(call, sequence)
    partials, out = at(float32, call[PARTIALS]), at(float32, call[OUT])
    for h in range(call[GROUP]):
        extra, weight, mean = compensation_of(call, sequence, head, row, h)
        top, total = extra, np.float32(0)
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
            for c in range(0, depth, 16):
                store(out, to + c, load(F, out, to + c) + load(F, partials, start + c) * weight)
        if total > 0:
            for c in range(0, depth, 16):
                store(out, to + c, load(F, out, to + c) * (np.float32(1) / total))
