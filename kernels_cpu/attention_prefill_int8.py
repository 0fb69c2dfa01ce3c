"""Prefill attention in 8 bits: a block of a sequence's newest tokens against cached tokens, for one KV head.

Rows are query tokens x heads of the group, so that K and V are shared. KEYS cached tokens at a time, in pages or one by one where a
list says so, become bytes in a scratch that stays in the cache: keys less the mean of the block's own (which adds the same to all scores
of a row: SageAttention, arXiv 2410.02367), a scale for each token; values, a scale for each token (attention_bytes.py,
attention_scores_int8.py). What a list leaves out can be made good in part (edgeattn/prefill_corrections.py).
"""
import numpy as np
from numba import float32, int32, int64, njit

from edgeattn.kernels_cpu.attention_bytes import (MEAN, ONES, ROWS, SCORES, SUMS, TOPS, WEIGHT_STARTS, WEIGHTED, mean_key,
                                                  pack_means, places, take_columns, take_mean, take_page)
from edgeattn.kernels_cpu.attention_call import (CORRECTION, DELTA, GROUP, HEAD_DIM, KEYS, LIST_HEADER, MEANS, NUM_HEADS, OUT, OUT_STRIDE,
                                                 PAGE, PREFILL_LISTS, ROTATED, SCRATCH, SCRATCH_SIZE, SKIP, TAIL, WIDTH, block_tokens,
                                                 entry_of, first_visible, rows_of, slots_of)
from edgeattn.kernels_cpu.attention_compensation import finish_row
from edgeattn.kernels_cpu.attention_scores_int8 import attend_lanes, pack_queries
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE
from edgeattn.kernels_cpu.float_tiles import BLOCK
from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import BIAS, at, fma, hsum, load, splat, store

LN2, LOG2_PAGE = np.float32(0.6931471805599453), np.float32(np.log2(PAGE))
NEVER = np.float32(1e30)  # a skip that no score reaches


@njit(nogil=True, error_model="numpy")
def _mean_score(call, token, head, member, mean):
    """What all scores of a row are too small by."""
    q, total = at(float32, call[ROTATED]), splat(F, np.float32(0))
    first = (token * call[NUM_HEADS] + head * call[GROUP] + member) * call[HEAD_DIM]
    for c in range(0, call[HEAD_DIM], 16):
        total = fma(load(F, q, first + c), load(F, mean, c), total)
    return hsum(total)


@njit(nogil=True, error_model="numpy")
def _attend_means(call, place, sequence, head, count, slot, table, start, pages, columns, skip):
    """Pages that the list does not name, nor a key of, PAGE times as their mean key with their mean value: prefill_corrections.tail."""
    means = at(int64, at(int64, call[PREFILL_LISTS])[sequence])[MEANS // 2]
    end, lane, taken, named, alone = slot // PAGE, np.int64(0), np.int64(0), start, start + pages
    for page in range(end):
        while alone < start + pages + columns and table[alone] < page * PAGE:
            alone += 1
        if named < start + pages and table[named] == page:
            named += 1
        elif not (alone < start + pages + columns and table[alone] < (page + 1) * PAGE) and entry_of(call, sequence, head, page) >= 0:
            take_mean(call, head, page, means, taken, lane, place)
            taken += 1
        if taken == PAGE or page == end - 1 and taken:
            lane += pack_means(call, taken, lane, place)
            taken = np.int64(0)
        if lane == KEYS or page == end - 1 and lane:
            attend_lanes(call, place, count, slot, lane, LOG2_PAGE, skip)
            lane = np.int64(0)


@njit(nogil=True, error_model="numpy")
def _attend_all(call, task, place, sequence, head, slot, high):
    """The block's first token against everything, from the start."""
    group, lane = call[GROUP], np.int64(0)
    _clear(place, group, call[WIDTH])
    for page in range(slot // PAGE + 1):
        lane += PAGE * take_page(call, task, sequence, head, page, high, lane, place)
        if lane == KEYS or page == slot // PAGE and lane:
            attend_lanes(call, place, group, slot, lane, np.float32(0), NEVER)
            lane = np.int64(0)


@njit(nogil=True, error_model="numpy")
def _clear(place, rows, width):
    out, sums, tops = at(float32, place[WEIGHTED]), at(float32, place[SUMS]), at(float32, place[TOPS])
    for i in range(rows):
        tops[i] = LOWEST_SCORE
        store(sums, 16 * i, splat(F, np.float32(0)))
    for i in range(rows * width):
        out[i] = 0


@njit(nogil=True, error_model="numpy")
def _finish(call, place, sequence, head, token, i, result, to):
    """The output of row i, a query of `token`, to result[to] and on."""
    member = i % call[GROUP]
    total = hsum(load(F, at(float32, place[SUMS]), i * 16))
    best = at(float32, place[TOPS])[i] * LN2 + _mean_score(call, token, head, member, at(float32, place[MEAN]))
    finish_row(call, sequence, head, token, member, total, best, at(float32, place[WEIGHTED]), i * call[WIDTH], result, to)


@njit(nogil=True, error_model="numpy")
def _shift(call, place, sequence, head, first, tokens):
    """What reading everything changes of the first token's outputs is added to all tokens': prefill_corrections.delta."""
    out, exact, depth = at(float32, call[OUT]), at(float32, place[SCORES]), call[HEAD_DIM]
    for member in range(call[GROUP]):
        _finish(call, place, sequence, head, first, member, exact, 0)
        to = first * call[OUT_STRIDE] + (head * call[GROUP] + member) * depth
        for c in range(0, depth, 16):
            change = load(F, exact, c) - load(F, out, to + c)
            for t in range(tokens):
                store(out, to + t * call[OUT_STRIDE] + c, load(F, out, to + t * call[OUT_STRIDE] + c) + change)


@worker
def attend_block_int8(call, sequence, head, block, thread):
    """Query tokens of one block of a sequence, all heads of the group of one KV head."""
    group, width, size = call[GROUP], call[WIDTH], block_tokens(call, sequence)
    row, rows = rows_of(call, sequence)
    begin = block * size
    tokens, slot = min(rows, begin + size) - begin, slots_of(call, sequence, head) - rows + begin
    count, tiles = tokens * group, (tokens * group + ROWS - 1) // ROWS
    task = call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]
    place = places(call, task, tiles * ROWS)
    mean_key(call, row + begin, tokens, head, at(float32, place[MEAN]))
    pack_queries(call, row + begin, head, count, tiles * ROWS, place)
    _clear(place, tiles * ROWS, width)
    for i in range(BLOCK):
        at(float32, place[ONES])[i] = 1
    for i in range(ROWS):
        at(int32, place[WEIGHT_STARTS])[i] = BIAS
    high, pages, columns, lists, start = slot + tokens, np.int64(0), np.int64(0), at(int64, call[PREFILL_LISTS])[sequence], np.int64(0)
    first, skip, correction = first_visible(call, slot) // PAGE, NEVER, np.int64(0)
    table = at(int32, lists)
    if lists:
        correction, skip = np.int64(table[CORRECTION]), at(float32, lists)[SKIP]
        first_list = LIST_HEADER + 2 * (head * ((rows + size - 1) // size) + block)
        start, pages = np.int64(table[first_list]), np.int64(table[first_list + 1] - table[first_list])
        columns = np.int64(table[first_list + 2] - table[first_list + 1])
    else:
        pages = (high + PAGE - 1) // PAGE - first
    lane = np.int64(0)
    for i in range(pages + (columns + PAGE - 1) // PAGE):
        if i < pages:
            page = np.int64(table[start + i]) if lists else first + i
            lane += PAGE * take_page(call, task, sequence, head, page, high, lane, place)
        else:
            j = start + pages + (i - pages) * PAGE
            lane += PAGE * take_columns(call, task, sequence, head, table, j, min(j + PAGE, start + pages + columns), high, lane, place)
        if lane == KEYS:
            attend_lanes(call, place, count, slot, lane, np.float32(0), skip)
            lane = np.int64(0)
    if lane:
        attend_lanes(call, place, count, slot, lane, np.float32(0), skip)
    if correction == TAIL:
        _attend_means(call, place, sequence, head, count, slot, table, start, pages, columns, skip)
    for i in range(count):
        token = row + begin + i // group
        to = token * call[OUT_STRIDE] + (head * group + i % group) * call[HEAD_DIM]
        _finish(call, place, sequence, head, token, i, at(float32, call[OUT]), to)
    if correction == DELTA:
        _attend_all(call, task, place, sequence, head, slot, high)
        _shift(call, place, sequence, head, row + begin, tokens)
