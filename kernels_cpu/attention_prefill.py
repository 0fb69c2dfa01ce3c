"""Prefill attention in float32, for caches of floats: a block of a sequence's newest tokens against all cached tokens they see, for one KV
head.

Rows are query tokens x heads of the group, so that K and V are shared. For KEYS cached tokens at a time: pages become float32 in
a scratch, tiles of ROWS rows are scored, softened (online softmax, arXiv 2205.14135) and multiplied with the values.
"""
import numpy as np
from numba import float32, njit, uint8

from edgeattn.kernels_cpu.attention_call import (GROUP, HEAD_DIM, KEYS, NUM_HEADS, OUT, OUT_STRIDE, PAGE, PLACE, POOLS, ROTATED, SCRATCH,
                                                 SCRATCH_SIZE, WIDTH, block_tokens, entry_of, first_visible, rows_of, slots_of)
from edgeattn.kernels_cpu.attention_compensation import finish_row
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, soften
from edgeattn.kernels_cpu.float_tiles import BLOCK, COLUMNS, ROWS, TILE, outer_add_rows
from edgeattn.kernels_cpu.floats import F, I, lane_numbers, where_less
from edgeattn.kernels_cpu.page_expand import expand_keys, expand_values
from edgeattn.kernels_cpu.page_pool import K as K_CODES, K_BYTES, V as V_CODES, V_BYTES, field_at, pool_of
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, hsum, load, load_rows, load_tile, outer_add, prefetch, splat, store, store_tile, zeros

STRIDE = KEYS + 16  # of a row of scores


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
def _copy_pages(call, task, sequence, head, first, high, keys, values, params):
    """Slots first ... first + KEYS, below `high`, as float32: keys [block of BLOCK tokens][channel][token], values [token][channel].
    -> (how many pages there were, how many released ones that leave nothing)."""
    depth, found, released = call[HEAD_DIM], 0, 0
    for start in range(first, min(high, first + KEYS), PAGE):
        entry, index = entry_of(call, sequence, head, start // PAGE), start - first
        if entry < 0:
            released += 1
            rows = at(float32, values + 4 * index * call[WIDTH])  # weights are 0 there, which do not make what lies there a number
            for i in range(0, PAGE * call[WIDTH], 16):
                store(rows, i, splat(F, np.float32(0)))
        else:
            found += 1
            expand_keys(call[POOLS], depth, task, entry, keys + 4 * index * depth, BLOCK, 16 if COLUMNS == 2 else 16 * depth, params)
            expand_values(call[POOLS], call[WIDTH], task, entry, min(PAGE, high - start), values + 4 * index * call[WIDTH], params)
    return found, released


@njit(nogil=True, error_model="numpy")
def _prefetch(call, sequence, head, first, high, share, shares):
    """One of `shares` parts of the codes of the KEYS tokens from `first` on."""
    pages = KEYS // PAGE
    for part in range(2 * pages * share // shares, 2 * pages * (share + 1) // shares):
        page = first // PAGE + part // 2
        if page * PAGE < high:
            entry = entry_of(call, sequence, head, page)
            if entry >= 0:
                pool = pool_of(call[POOLS], entry)
                start = field_at(pool, V_CODES if part & 1 else K_CODES, entry)
                for line in range(start, start + pool[V_BYTES if part & 1 else K_BYTES], 64):
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
def _weigh(scores, begin, end, values, width, depth, out, to):
    """out[ROWS, channels] += weights times the values of tokens begin ... end."""
    whole = depth // BLOCK * BLOCK
    for c in range(0, whole, BLOCK):
        acc = load_rows(F, ROWS, COLUMNS, out, to + c, depth, 16)
        for t in range(begin, end):
            acc = outer_add_rows(acc, load_tile(F, COLUMNS, values, t * width + c, 16), scores, t, STRIDE)
        store_tile(out, to + c, depth, 16, COLUMNS, acc)
    for c in range(whole, depth, 16):
        rest = load_rows(F, ROWS, 1, out, to + c, depth, 16)
        for t in range(begin, end):
            rest = outer_add_rows(rest, load_tile(F, 1, values, t * width + c, 16), scores, t, STRIDE)
        store_tile(out, to + c, depth, 16, 1, rest)


@njit(nogil=True, error_model="numpy")
def _hide_released(call, sequence, head, first, scores, row, begin, end):
    """-inf for the slots of released pages."""
    for i in range(begin, end, 16):
        if entry_of(call, sequence, head, (first + i) // PAGE) < 0:
            store(scores, row + i, splat(F, np.float32(-np.inf)))


@njit(nogil=True, error_model="numpy")
def _tile(call, sequence, head, places, tile, count, slot, first, released):
    """ROWS rows against the KEYS slots from `first` on; `slot` is the block's first token's."""
    keys, values, packed, out, sums, tops, scores = places
    depth, group = call[HEAD_DIM], call[GROUP]
    top, tail = tile * ROWS, min(tile * ROWS + ROWS, count) - 1
    low = max(0, first_visible(call, slot + top // group) - first)
    high = min(KEYS, slot + tail // group + 1 - first)
    if low >= high:
        return
    begin, end = low // BLOCK * BLOCK, (high + BLOCK - 1) // BLOCK * BLOCK
    for i in range(begin, end, BLOCK):
        _score(keys, i * depth, depth, packed, top * depth, scores, i)
    for row in range(top, tail + 1):
        start, last = (row - top) * STRIDE, slot + row // group
        _hide(scores, start, begin, end, first_visible(call, last) - first, last + 1 - first)
        if released:
            _hide_released(call, sequence, head, first, scores, start, begin, min(end, high))
        soften(scores, start + begin, start + end, tops, sums, row, out, row * depth, depth)
    _weigh(scores, begin, high, values, call[WIDTH], depth, out, top * depth)


@njit(nogil=True, error_model="numpy")
def _places(call, scratch, rows):
    """Keys, values, packed q, weighted sums, sums of weights (16 lanes), maxima and scores in a thread's scratch; where parameters go."""
    depth, width = call[HEAD_DIM], call[WIDTH]
    keys = scratch + PLACE
    values = keys + 4 * KEYS * depth
    packed = values + 4 * KEYS * width
    out, sums = packed + 4 * rows * depth, packed + 8 * rows * depth
    tops, scores = sums + 64 * rows, sums + 68 * rows
    floats = (at(float32, keys), at(float32, values), at(float32, packed), at(float32, out), at(float32, sums), at(float32, tops),
              at(float32, scores))
    return floats, keys, values, (scores + 4 * ROWS * STRIDE + 63) // 64 * 64


@worker
def attend_block(call, sequence, head, block, thread):
    """Query tokens of one block of a sequence, all heads of the group of one KV head."""
    depth, group, size = call[HEAD_DIM], call[GROUP], block_tokens(call, sequence)
    row, rows = rows_of(call, sequence)
    begin = block * size
    count, slot = (min(rows, begin + size) - begin) * group, slots_of(call, sequence, head) - rows + begin
    tiles = (count + ROWS - 1) // ROWS
    scratch = call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]
    places, key_address, value_address, params = _places(call, scratch, tiles * ROWS)
    out, tops = places[3], places[5]
    _pack_queries(call, row + begin, head, count, tiles, places[2])
    for i in range(tiles * ROWS * (depth + 16)):
        out[i] = 0
    for i in range(tiles * ROWS):
        tops[i] = LOWEST_SCORE
    low, high = first_visible(call, slot), slot + count // group
    for first in range(low // KEYS * KEYS, high, KEYS):
        found, released = _copy_pages(call, scratch, sequence, head, first, high, key_address, value_address, params)
        if found:
            for tile in range(tiles):
                _prefetch(call, sequence, head, first + KEYS, high, tile, tiles)
                _tile(call, sequence, head, places, tile, count, slot, first, released)
    for i in range(count):
        token = row + begin + i // group
        to = token * call[OUT_STRIDE] + (head * group + i % group) * depth
        total = hsum(load(F, places[4], i * 16))
        finish_row(call, sequence, head, token, i % group, total, tops[i], out, i * depth, at(float32, call[OUT]), to)
