"""Prefill attention: a block of a sequence's newest tokens against all cached tokens they see, for one KV head.

Rows are query tokens x heads of the group, so that K and V are shared. For KEYS cached tokens at a time: pages become float32 in
a scratch, tiles of ROWS rows are scored, softened (online softmax, arXiv 2205.14135) and multiplied with the values.
"""
import numpy as np
from numba import float32, njit, uint8, uint16

from edgeattn.kernels_cpu.attention_call import (CACHE_TYPE, GROUP, HEAD_DIM, K_POOL, KEYS, NUM_HEADS, OUT, OUT_STRIDE,
                                                 PAGE_SIZE, QUERIES, ROTATED, SCRATCH, SCRATCH_SIZE, V_POOL, first_visible, page_base,
                                                 rows_of)
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, soften
from edgeattn.kernels_cpu.float_tiles import BLOCK, COLUMNS, ROWS, TILE, outer_add_rows
from edgeattn.kernels_cpu.floats import F, I, lane_numbers, load_float, where_less
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, hsum, load, load_rows, load_tile, outer_add, prefetch, splat, store, store_tile, zeros

STRIDE = KEYS + 16  # of a row of scores


@njit(nogil=True, error_model="numpy")
def query_blocks(call, rows):
    """How many prefill tasks `rows` new tokens make for each KV head."""
    size = max(1, QUERIES // call[GROUP])
    return (rows + size - 1) // size


@njit(nogil=True, error_model="numpy")
def _pack_queries(call, first_token, head, count, tiles, packed):
    """Rotated q of `count` rows (token by token, the group's heads together) as [tile][channel][ROWS], zeros behind them."""
    rotated, depth, group = at(float32, call[ROTATED]), call[HEAD_DIM], call[GROUP]
    for row in range(tiles * ROWS):
        to = row // ROWS * depth * ROWS + row % ROWS
        source = ((first_token + row // group) * call[NUM_HEADS] + head * group + row % group) * depth
        for d in range(depth):
            packed[to + d * ROWS] = rotated[source + d] if row < count else np.float32(0)


@njit(nogil=True, error_model="numpy")
def _copy_pages(call, k, v, sequence, head, first, low, high, keys, values):
    """Cached tokens low ... high as float32: keys [block of BLOCK tokens][channel][token], values [token][channel]."""
    depth, size = call[HEAD_DIM], call[PAGE_SIZE]
    for token in range(low // 16 * 16, high, 16):
        base = page_base(call, sequence, head, token // size)
        index, inside = token - first, token % size
        to = index // BLOCK * BLOCK * depth + index % BLOCK
        for d in range(depth):
            store(keys, to + d * BLOCK, load_float(k, base + d * size + inside))
        for t in range(min(16, high - token)):
            for d in range(0, depth, 16):
                store(values, (index + t) * depth + d, load_float(v, base + (inside + t) * depth + d))


@njit(nogil=True, error_model="numpy")
def _prefetch(call, sequence, head, first, high, share, shares):
    """One of `shares` parts of the pages of the KEYS tokens from `first` on."""
    width = 2 if call[CACHE_TYPE] else 4
    page_bytes, pages = call[HEAD_DIM] * call[PAGE_SIZE] * width, KEYS // call[PAGE_SIZE]
    for part in range(2 * pages * share // shares, 2 * pages * (share + 1) // shares):
        logical = first // call[PAGE_SIZE] + part // 2
        if logical * call[PAGE_SIZE] < high:
            start = call[V_POOL if part & 1 else K_POOL] + page_base(call, sequence, head, logical) * width
            for line in range(start, start + page_bytes, 64):
                prefetch(at(uint8, line), 0)


@njit(nogil=True, error_model="numpy")
def _score(keys, first, depth, packed, q_at, scores, to):
    acc = zeros(F, TILE)
    for d in range(depth):
        acc = outer_add(acc, load_tile(F, COLUMNS, keys, first + d * BLOCK, 16), packed, q_at + d * ROWS)
    store_tile(scores, to, STRIDE, 16, COLUMNS, acc)


@njit(nogil=True, error_model="numpy")
def _hide(scores, row, begin, end, low, high):
    """-inf for the tokens outside low ... high."""
    for i in range(begin, end, 16):
        if i < low or i + 16 > high:
            lanes, hidden = lane_numbers(I) + np.int32(i), splat(F, np.float32(-np.inf))
            x = where_less(lanes, splat(I, np.int32(high)), load(F, scores, row + i), hidden)
            store(scores, row + i, where_less(lanes, splat(I, np.int32(low)), hidden, x))


@njit(nogil=True, error_model="numpy")
def _weigh(scores, begin, end, values, depth, out, to):
    """out[ROWS, channels] += weights times the values of tokens begin ... end."""
    whole = depth // BLOCK * BLOCK
    for c in range(0, whole, BLOCK):
        acc = load_rows(F, ROWS, COLUMNS, out, to + c, depth, 16)
        for t in range(begin, end):
            acc = outer_add_rows(acc, load_tile(F, COLUMNS, values, t * depth + c, 16), scores, t, STRIDE)
        store_tile(out, to + c, depth, 16, COLUMNS, acc)
    for c in range(whole, depth, 16):
        rest = load_rows(F, ROWS, 1, out, to + c, depth, 16)
        for t in range(begin, end):
            rest = outer_add_rows(rest, load_tile(F, 1, values, t * depth + c, 16), scores, t, STRIDE)
        store_tile(out, to + c, depth, 16, 1, rest)


@njit(nogil=True, error_model="numpy")
def _tile(call, keys, values, packed, scores, out, sums, tops, tile, count, position, first):
    """ROWS rows against the KEYS tokens from `first` on; `position` is the place in the sequence of the block's first token."""
    depth, group = call[HEAD_DIM], call[GROUP]
    head, tail = tile * ROWS, min(tile * ROWS + ROWS, count) - 1
    low = max(0, first_visible(call, position + head // group) - first)
    high = min(KEYS, position + tail // group + 1 - first)
    if low >= high:
        return
    begin, end = low // BLOCK * BLOCK, (high + BLOCK - 1) // BLOCK * BLOCK
    for i in range(begin, end, BLOCK):
        _score(keys, i * depth, depth, packed, head * depth, scores, i)
    for row in range(head, tail + 1):
        start, last = (row - head) * STRIDE, position + row // group
        _hide(scores, start, begin, end, first_visible(call, last) - first, last + 1 - first)
        soften(scores, start + begin, start + end, tops, sums, row, out, row * depth, depth)
    _weigh(scores, low, high, values, depth, out, head * depth)


@njit(nogil=True, error_model="numpy")
def _places(scratch, rows, depth):
    """Where keys, values, packed q, weighted sums, sums of weights (16 lanes), maxima and scores lie in a thread's scratch."""
    values, packed = scratch + 4 * KEYS * depth, scratch + 8 * KEYS * depth
    out, sums = packed + 4 * rows * depth, packed + 8 * rows * depth
    tops, scores = sums + 64 * rows, sums + 68 * rows
    return (at(float32, scratch), at(float32, values), at(float32, packed), at(float32, out), at(float32, sums), at(float32, tops),
            at(float32, scores))


@worker
def attend_block(call, sequence, head, block, thread):
    """Query tokens of one block of a sequence, all heads of the group of one KV head."""
    depth, group, size = call[HEAD_DIM], call[GROUP], max(1, QUERIES // call[GROUP])
    row, rows, length = rows_of(call, sequence)
    begin = block * size
    count, position = (min(rows, begin + size) - begin) * group, length - rows + begin
    tiles = (count + ROWS - 1) // ROWS
    keys, values, packed, out, sums, tops, scores = _places(call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE], tiles * ROWS, depth)
    _pack_queries(call, row + begin, head, count, tiles, packed)
    for i in range(tiles * ROWS * (depth + 16)):
        out[i] = 0
    for i in range(tiles * ROWS):
        tops[i] = LOWEST_SCORE
    low, high = first_visible(call, position), position + count // group
    for first in range(low // KEYS * KEYS, high, KEYS):
        if call[CACHE_TYPE]:
            _copy_pages(call, at(uint16, call[K_POOL]), at(uint16, call[V_POOL]), sequence, head, first, max(low, first),
                        min(high, first + KEYS), keys, values)
        else:
            _copy_pages(call, at(float32, call[K_POOL]), at(float32, call[V_POOL]), sequence, head, first, max(low, first),
                        min(high, first + KEYS), keys, values)
        for tile in range(tiles):
            _prefetch(call, sequence, head, first + KEYS, high, tile, tiles)
            _tile(call, keys, values, packed, scores, out, sums, tops, tile, count, position, first)
    result = at(float32, call[OUT])
    for i in range(count):
        to = (row + begin + i // group) * call[OUT_STRIDE] + (head * group + i % group) * depth
        for c in range(0, depth, 16):
            store(result, to + c, load(F, out, i * depth + c) * (np.float32(1) / hsum(load(F, sums, i * 16))))
