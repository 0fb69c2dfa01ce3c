"""Decode attention: one query token of a sequence against a range of its pages, for all query heads of one KV head.

Each page is read once. CHUNK tokens are scored, then their values weighed (an online softmax between chunks), while the pages
that come next are prefetched. Ranges of one sequence are merged at the end (flash decoding).
"""
import numpy as np
from numba import njit

from edgeattn.kernels_cpu.attention_call import CHUNK, DECODE_ROWS, LOWEST_SCORE, first_visible, page_base, rows_of
from edgeattn.kernels_cpu.floats import BLOCK, COLUMNS, F, exp_low, load_block, load_float, load_floats, outer_add_rows
from edgeattn.kernels_cpu.simd import hmax, hsum, load, prefetch, splat, store, store_tile, vmax, zeros
from edgeattn.kernels_cpu.steps import f32_at, i32_at

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
    if call.selection_pages:
        return 0, np.int64(i32_at(call.selection_counts, 1)[sequence * call.kv_heads + head])
    first = first_visible(call, length - 1) // call.cache_page_size
    return first, (length + call.cache_page_size - 1) // call.cache_page_size - first


@njit(nogil=True, error_model="numpy")
def _segment(call, sequence, head, first, i):
    """(K element, V element, logical token) where segment i of the pages from `first` on starts."""
    per_page = call.cache_page_size // 16
    index, inside = first + i // per_page, i % per_page * 16
    if call.selection_pages:
        index = np.int64(i32_at(call.selection_pages, 1)[(sequence * call.kv_heads + head) * call.selection_capacity + index])
    base = page_base(call, sequence, head, index)
    return base + inside, base + inside * call.head_dim, index * call.cache_page_size + inside


@njit(nogil=True, error_model="numpy")
def _score(q, q_at, depth, k, size, first, second, ahead, ahead_second, scores, to):
    """Scores of DECODE_ROWS heads with the tokens of COLUMNS segments."""
    acc = zeros(F, TILE)
    for d in range(depth):
        acc = outer_add_rows(acc, _two(k, first + d * size, second + d * size), q, q_at + d, depth)
        prefetch(k, ahead + d * size)
        if k.itemsize == 4:
            prefetch(k, ahead_second + d * size)
    store_tile(scores, to, STRIDE, 16, COLUMNS, acc)


@njit(nogil=True, error_model="numpy")
def _weigh(p, at, depth, v, base, ahead, count, out, to):
    """out[DECODE_ROWS heads, all channels] += p times the values of one segment, BLOCK channels at a time."""
    whole = depth // BLOCK * BLOCK
    for c in range(0, whole, BLOCK):
        acc = load_block(DECODE_ROWS, COLUMNS, out, to + c, depth)
        for t in range(count):
            acc = outer_add_rows(acc, load_floats(COLUMNS, v, base + t * depth + c, 16), p, at + t, STRIDE)
            prefetch(v, ahead + t * depth + c)
            if v.itemsize == 4:
                prefetch(v, ahead + t * depth + c + 16)
        store_tile(out, to + c, depth, 16, COLUMNS, acc)
    for c in range(whole, depth, 16):
        rest = load_block(DECODE_ROWS, 1, out, to + c, depth)
        for t in range(count):
            rest = outer_add_rows(rest, load_floats(1, v, base + t * depth + c, 16), p, at + t, STRIDE)
            prefetch(v, ahead + t * depth + c)
        store_tile(out, to + c, depth, 16, 1, rest)


@njit(nogil=True, error_model="numpy")
def _hide(scores, heads, at, start, low, high):
    """-inf for the tokens of a segment outside low ... high."""
    if start < low or start + 16 > high:
        for t in range(16):
            if start + t < low or start + t >= high:
                for h in range(heads):
                    scores[h * STRIDE + at + t] = -np.inf


@njit(nogil=True, error_model="numpy")
def _soften(scores, row, count, tops, sums, head, out, to, depth):
    """Scores of a head to weights relative to its running maximum; rescales what was summed under the old one."""
    best = splat(F, np.float32(-np.inf))
    for i in range(row, row + count, 16):
        best = vmax(best, load(F, scores, i))
    top = max(tops[head], hmax(best))
    shift, factor = splat(F, top), exp_low(splat(F, tops[head] - top))
    total = load(F, sums, head * 16) * factor
    for i in range(row, row + count, 16):
        p = exp_low(load(F, scores, i) - shift)
        store(scores, i, p)
        total += p
    store(sums, head * 16, total)
    if top > tops[head]:
        tops[head] = top
        for c in range(to, to + depth, 16):
            store(out, c, load(F, out, c) * factor)


@njit(nogil=True, error_model="numpy")
def _chunk(call, k, v, sequence, head, first, begin, end, last, low, high, scratch):
    """Segments begin ... end of the task, at most CHUNK tokens; the task ends at segment `last`."""
    depth, size, group = call.head_dim, call.cache_page_size, call.group
    blocks = (group + DECODE_ROWS - 1) // DECODE_ROWS
    heads = blocks * DECODE_ROWS
    q, scores, out = f32_at(call.rotated, 1), scratch, scratch[heads * STRIDE:]
    sums, tops = out[heads * depth:], out[heads * (depth + 16):]
    row, _, _ = rows_of(call, sequence)
    q_at = (row * call.num_heads + head * group) * depth
    for i in range(begin, end, COLUMNS):
        one, _, start = _segment(call, sequence, head, first, i)
        two, _, start_two = _segment(call, sequence, head, first, min(i + COLUMNS, end) - 1)
        ahead, _, _ = _segment(call, sequence, head, first, min(i + AHEAD, last - 1))
        ahead_two, _, _ = _segment(call, sequence, head, first, min(i + AHEAD + COLUMNS, last) - 1)
        at = (i - begin) * 16
        for b in range(blocks):
            _score(q, q_at + b * DECODE_ROWS * depth, depth, k, size, one, two, ahead, ahead_two, scores,
                   b * DECODE_ROWS * STRIDE + at)
        _hide(scores, heads, at, start, low, high)
        if COLUMNS == 2:
            _hide(scores, heads, at + 16, start_two, low, high if i + 1 < end else 0)
    count = (end - begin + COLUMNS - 1) // COLUMNS * BLOCK
    for h in range(group):
        _soften(scores, h * STRIDE, count, tops, sums, h, out, h * depth, depth)
    for i in range(begin, end):
        _, base, start = _segment(call, sequence, head, first, i)
        _, ahead, _ = _segment(call, sequence, head, first, min(i + AHEAD, last - 1))
        skip = max(0, low - start)  # hidden values may never have been written
        for b in range(blocks):
            _weigh(scores, b * DECODE_ROWS * STRIDE + (i - begin) * 16 + skip, depth, v, base + skip * depth, ahead,
                   min(16, high - start) - skip, out, b * DECODE_ROWS * depth)


@njit(nogil=True, error_model="numpy")
def attend_range(call, k, v, sequence, head, begin, end, scratch, partial):
    """Pages begin ... end (of those visible) of one KV head -> partial [group, head_dim + 16]: weighted sum, maximum, sum."""
    depth, group, per_page = call.head_dim, call.group, call.cache_page_size // 16
    heads = (group + DECODE_ROWS - 1) // DECODE_ROWS * DECODE_ROWS
    out, sums, tops = heads * STRIDE, heads * (STRIDE + depth), heads * (STRIDE + depth + 16)
    for i in range(out, tops):
        scratch[i] = 0
    for i in range(tops, tops + heads):
        scratch[i] = LOWEST_SCORE
    first, count = visible_pages(call, sequence, head)
    _, _, length = rows_of(call, sequence)
    low = first_visible(call, length - 1)
    last = max(0, min(end, count) - begin) * per_page
    if not call.selection_pages:  # segments of the last page that hold no token yet
        last = min(last, (length + 15) // 16 - (first + begin) * per_page)
    for i in range(0, last, CHUNK // 16):
        _chunk(call, k, v, sequence, head, first + begin, i, min(i + CHUNK // 16, last), last, low, length, scratch)
    for h in range(group):
        to = h * (depth + 16)
        for c in range(0, depth, 16):
            store(partial, to + c, load(F, scratch, out + h * depth + c))
        partial[to + depth], partial[to + depth + 1] = scratch[tops + h], hsum(load(F, scratch, sums + h * 16))


@njit(nogil=True, error_model="numpy")
def merge_ranges(call, sequence, head, first_task, ranges):
    """The output of one KV head's query heads from the partial results of all ranges."""
    depth, width = call.head_dim, call.head_dim + 16
    row, _, _ = rows_of(call, sequence)
    partials, out = f32_at(call.partials, 1), f32_at(call.out, 1)
    for h in range(call.group):
        top, total = LOWEST_SCORE, np.float32(0)
        to = row * call.out_stride + (head * call.group + h) * depth
        for r in range(ranges):
            top = max(top, partials[((first_task + r * call.kv_heads + head) * call.group + h) * width + depth])
        for c in range(0, depth, 16):
            store(out, to + c, splat(F, np.float32(0)))
        for r in range(ranges):
            at = ((first_task + r * call.kv_heads + head) * call.group + h) * width
            weight = np.exp(partials[at + depth] - top)
            total += weight * partials[at + depth + 1]
            for c in range(0, depth, 16):
                store(out, to + c, load(F, out, to + c) + load(F, partials, at + c) * weight)
        if total > 0:
            for c in range(0, depth, 16):
                store(out, to + c, load(F, out, to + c) * (np.float32(1) / total))
