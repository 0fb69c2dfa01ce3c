"""Decode attention: one query token of a sequence against a range of its pages, for all query heads of one KV head.

Each page is read once. CHUNK tokens are scored, then their values weighed (an online softmax between chunks), while the pages
that come next are prefetched. Ranges of one sequence are merged at the end (flash decoding).
"""
import numpy as np
from numba import float32, int32, int64, njit, uint16

from edgeattn.kernels_cpu.attention_call import (CACHE_TYPE, CHUNK, DECODE_ROWS, GROUP, HEAD_DIM, K_POOL, KV_HEADS, NUM_HEADS,
                                                 OUT, OUT_STRIDE, PAGE_SIZE, PARTIALS, RANGE_PAGES, ROTATED, SCRATCH, SCRATCH_SIZE,
                                                 SELECTED, SELECTED_CAPACITY, SELECTED_COUNTS, SEGMENT_SHIFT, SEQUENCES, STARTS, V_POOL,
                                                 first_visible, page_base, rows_of)
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, soften
from edgeattn.kernels_cpu.float_tiles import BLOCK, COLUMNS, load_floats, outer_add_rows
from edgeattn.kernels_cpu.floats import F, is_half, load_float
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, hsum, load, load_rows, prefetch, splat, store, store_tile, zeros

STRIDE = CHUNK + 16           # of a row of scores
AHEAD = 2 * BLOCK // 16       # segments prefetched ahead
TILE = DECODE_ROWS * COLUMNS

if COLUMNS == 2:
    @njit(nogil=True, error_model="numpy")
    def _two(array, first, second):
        return load_float(array, first), load_float(array, second)
else:
    @njit(nogil=True, error_model="numpy")
    def _two(array, first, second):
        return (load_float(array, first),)


@njit(nogil=True, error_model="numpy")
def visible_pages(call, sequence, head):
    """(first logical page, how many) that a decode step reads; with a selection the list's length."""
    _, _, length = rows_of(call, sequence)
    if call[SELECTED]:
        return 0, np.int64(at(int32, call[SELECTED_COUNTS])[sequence * call[KV_HEADS] + head])
    first = first_visible(call, length - 1) // call[PAGE_SIZE]
    return first, (length + call[PAGE_SIZE] - 1) // call[PAGE_SIZE] - first


@njit(nogil=True, error_model="numpy")
def _segment(call, sequence, head, first, i):
    """(K element, V element, logical token) where segment i of the pages from `first` on starts."""
    shift = call[SEGMENT_SHIFT]
    index, inside = first + (i >> shift), (i & (1 << shift) - 1) * 16
    if call[SELECTED]:
        index = np.int64(at(int32, call[SELECTED])[(sequence * call[KV_HEADS] + head) * call[SELECTED_CAPACITY] + index])
    base = page_base(call, sequence, head, index)
    return base + inside, base + inside * call[HEAD_DIM], index * call[PAGE_SIZE] + inside


@njit(nogil=True, error_model="numpy")
def _score(q, q_at, depth, k, size, first, second, ahead, ahead_second, scores, to):
    """Scores of DECODE_ROWS heads with the tokens of COLUMNS segments."""
    acc = zeros(F, TILE)
    for d in range(depth):
        acc = outer_add_rows(acc, _two(k, first + d * size, second + d * size), q, q_at + d, depth)
        prefetch(k, ahead + d * size)
        if not is_half(k):
            prefetch(k, ahead_second + d * size)
    store_tile(scores, to, STRIDE, 16, COLUMNS, acc)


@njit(nogil=True, error_model="numpy")
def _weigh(p, p_at, depth, v, base, ahead, count, out, to):
    """out[DECODE_ROWS heads, all channels] += p times the values of `count` tokens of a page, BLOCK channels at a time."""
    whole = depth // BLOCK * BLOCK
    for c in range(0, whole, BLOCK):
        acc = load_rows(F, DECODE_ROWS, COLUMNS, out, to + c, depth, 16)
        for t in range(count):
            acc = outer_add_rows(acc, load_floats(COLUMNS, v, base + t * depth + c, 16), p, p_at + t, STRIDE)
            prefetch(v, ahead + t * depth + c)
            if not is_half(v):
                prefetch(v, ahead + t * depth + c + 16)
        store_tile(out, to + c, depth, 16, COLUMNS, acc)
    for c in range(whole, depth, 16):
        rest = load_rows(F, DECODE_ROWS, 1, out, to + c, depth, 16)
        for t in range(count):
            rest = outer_add_rows(rest, load_floats(1, v, base + t * depth + c, 16), p, p_at + t, STRIDE)
            prefetch(v, ahead + t * depth + c)
        store_tile(out, to + c, depth, 16, 1, rest)


@njit(nogil=True, error_model="numpy")
def _hide(scores, heads, to, start, low, high):
    """-inf for the tokens of a segment outside low ... high."""
    if start < low or start + 16 > high:
        for t in range(16):
            if start + t < low or start + t >= high:
                for h in range(heads):
                    scores[h * STRIDE + to + t] = -np.inf


@njit(nogil=True, error_model="numpy")
def _score_pair(call, half, row, first, i, end, last, scores, at_score):
    """Scores of segments i ... i + COLUMNS for all query heads of the KV head; `row` is (sequence, KV head, row of q)."""
    sequence, head, q_row = row
    depth, size, q = call[HEAD_DIM], call[PAGE_SIZE], at(float32, call[ROTATED])
    one, two = _segment(call, sequence, head, first, i)[0], _segment(call, sequence, head, first, min(i + COLUMNS, end) - 1)[0]
    ahead = _segment(call, sequence, head, first, min(i + AHEAD, last - 1))[0]
    ahead_two = _segment(call, sequence, head, first, min(i + AHEAD + COLUMNS, last) - 1)[0]
    for h in range(0, call[GROUP], DECODE_ROWS):
        q_at = (q_row * call[NUM_HEADS] + head * call[GROUP] + h) * depth
        if half:
            _score(q, q_at, depth, at(uint16, call[K_POOL]), size, one, two, ahead, ahead_two, scores, h * STRIDE + at_score)
        else:
            _score(q, q_at, depth, at(float32, call[K_POOL]), size, one, two, ahead, ahead_two, scores, h * STRIDE + at_score)


@njit(nogil=True, error_model="numpy")
def _weigh_page(call, half, row, first, i, last, low, high, scores, at_score, out):
    """Add the weighted values of the page of segment i; values of hidden tokens may never have been written, so they are not read."""
    sequence, head, _ = row
    depth = call[HEAD_DIM]
    _, base, start = _segment(call, sequence, head, first, i)
    ahead = _segment(call, sequence, head, first, min(i + AHEAD, last - 1))[1]
    skip = max(0, low - start)
    count = min(call[PAGE_SIZE], high - start) - skip
    for h in range(0, call[GROUP], DECODE_ROWS):
        p = h * STRIDE + at_score + skip
        if half:
            _weigh(scores, p, depth, at(uint16, call[V_POOL]), base + skip * depth, ahead, count, out, h * depth)
        else:
            _weigh(scores, p, depth, at(float32, call[V_POOL]), base + skip * depth, ahead, count, out, h * depth)


@njit(nogil=True, error_model="numpy")
def _chunk(call, row, first, begin, end, last, low, high, scratch):
    """Segments begin ... end of the task, at most CHUNK tokens; the task ends at segment `last`."""
    sequence, head, _ = row
    depth, group, half = call[HEAD_DIM], call[GROUP], call[CACHE_TYPE] == 1
    heads = (group + DECODE_ROWS - 1) // DECODE_ROWS * DECODE_ROWS
    scores, out, sums, tops = _places(scratch, heads, depth)
    for i in range(begin, end, COLUMNS):
        _score_pair(call, half, row, first, i, end, last, scores, (i - begin) * 16)
        for c in range(COLUMNS):
            start = _segment(call, sequence, head, first, min(i + c, end - 1))[2]
            _hide(scores, heads, (i - begin + c) * 16, start, low, high if i + c < end else 0)
    count = (end - begin + COLUMNS - 1) // COLUMNS * BLOCK
    for h in range(group):
        soften(scores, h * STRIDE, h * STRIDE + count, tops, sums, h, out, h * depth, depth)
    for i in range(begin, end, call[PAGE_SIZE] // 16):
        _weigh_page(call, half, row, first, i, last, low, high, scores, (i - begin) * 16, out)


@njit(nogil=True, error_model="numpy")
def _places(scratch, heads, depth):
    """Where scores, weighted sums, sums of weights (16 lanes) and maxima lie in a thread's scratch."""
    out = scratch + 4 * heads * STRIDE
    sums = out + 4 * heads * depth
    return at(float32, scratch), at(float32, out), at(float32, sums), at(float32, sums + 64 * heads)


@njit(nogil=True, error_model="numpy")
def partial_at(call, sequence, head, part, h):
    """First element of one query head's partial result."""
    task = at(int64, call[STARTS])[call[SEQUENCES] + 1 + sequence] + part * call[KV_HEADS] + head
    return (task * call[GROUP] + h) * (call[HEAD_DIM] + 16)


@worker
def attend_range(call, sequence, head, part, thread):
    """Range `part` of the pages that one KV head sees -> its partial [group, head_dim + 16]: weighted sum, maximum, sum."""
    depth, group, per_page, size = call[HEAD_DIM], call[GROUP], call[PAGE_SIZE] // 16, call[RANGE_PAGES]
    heads = (group + DECODE_ROWS - 1) // DECODE_ROWS * DECODE_ROWS
    scratch = call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]
    _, out, sums, tops = _places(scratch, heads, depth)
    for i in range(heads * (depth + 16)):
        out[i] = 0
    for h in range(heads):
        tops[h] = LOWEST_SCORE
    first, count = visible_pages(call, sequence, head)
    row, _, length = rows_of(call, sequence)
    last = max(0, min(size, count - part * size)) * per_page
    first += part * size
    if not call[SELECTED]:  # segments of the last page that hold no token yet
        last = min(last, (length + 15) // 16 - first * per_page)
    for i in range(0, last, CHUNK // 16):
        _chunk(call, (sequence, head, row), first, i, min(i + CHUNK // 16, last), last, first_visible(call, length - 1), length, scratch)
    partial = at(float32, call[PARTIALS])
    for h in range(group):
        to = partial_at(call, sequence, head, part, h)
        for c in range(0, depth, 16):
            store(partial, to + c, load(F, out, h * depth + c))
        partial[to + depth], partial[to + depth + 1] = tops[h], hsum(load(F, sums, h * 16))


@worker
def merge_ranges(call, ranges, sequence, head, thread):
    """The output of one KV head's query heads from the partial results of all ranges."""
    depth = call[HEAD_DIM]
    row, _, _ = rows_of(call, sequence)
    partials, out = at(float32, call[PARTIALS]), at(float32, call[OUT])
    for h in range(call[GROUP]):
        top, total = LOWEST_SCORE, np.float32(0)
        to = row * call[OUT_STRIDE] + (head * call[GROUP] + h) * depth
        for r in range(ranges):
            top = max(top, partials[partial_at(call, sequence, head, r, h) + depth])
        for c in range(0, depth, 16):
            store(out, to + c, splat(F, np.float32(0)))
        for r in range(ranges):
            start = partial_at(call, sequence, head, r, h)
            weight = np.exp(partials[start + depth] - top)
            total += weight * partials[start + depth + 1]
            for c in range(0, depth, 16):
                store(out, to + c, load(F, out, to + c) + load(F, partials, start + c) * weight)
        if total > 0:
            for c in range(0, depth, 16):
                store(out, to + c, load(F, out, to + c) * (np.float32(1) / total))
