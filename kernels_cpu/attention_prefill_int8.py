"""Prefill attention in 8 bits: a block of a sequence's newest tokens against cached tokens, for one KV head.

Rows are query tokens x heads of the group, so that K and V are shared. KEYS cached tokens at a time, in pages or one by one where a
list says so, become bytes in a scratch that stays in the cache: keys less the mean of the block's own (which adds the same to all scores
of a row: SageAttention, arXiv 2410.02367), a scale for each token; values, a scale for each token, which the weights of its scores
take over before they become bytes too, a scale for each row. Sums of products are integers, all else is float32. Codes of
keys (attention_bytes.py) have MIDDLE added, so their sums start at -MIDDLE times the sum of the query's.
"""
import numpy as np
from numba import float32, int8, int32, int64, njit, uint8

from edgeattn.kernels_cpu.attention_bytes import (KEY_BYTES, KEY_SCALES, MEAN, MIDDLE, ONES, QUERY_BYTES, QUERY_SCALES, QUERY_STARTS, ROWS,
                                                  SCORES, SLOTS, STRIDE, SUMS, TINY, TOPS, UNSEEN, VALUE_BYTES, VALUE_PARTS, VALUE_SCALES,
                                                  WEIGHT_BYTES, WEIGHT_SCALES, WEIGHT_STARTS, WEIGHTED, mean_key, places, take_columns,
                                                  take_page)
from edgeattn.kernels_cpu.attention_call import (GROUP, HEAD_DIM, KEYS, NUM_HEADS, OUT, OUT_STRIDE, PAGE, PREFILL_LISTS, ROTATED, SCRATCH,
                                                 SCRATCH_SIZE, WIDTH, WINDOW, block_tokens, first_visible, rows_of, slots_of)
from edgeattn.kernels_cpu.attention_compensation import finish_row
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, SLACK
from edgeattn.kernels_cpu.float_tiles import BLOCK, COLUMNS
from edgeattn.kernels_cpu.floats import F, I, where_less
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import (BIAS, CODE_TOP, at, bitcast, broadcast_rows, convert, fma, hmax, hsum, i8, load, load_rows,
                                       load_tile, nearest, outer_dot_codes, outer_dot_rows, outer_fma, splat, store,
                                       store_tile, u8, vabs, vmax, zeros)

TILE, WEIGHT_TOP = ROWS * COLUMNS, np.float32(CODE_TOP)
LOG2E, LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
B, U = i8(16), u8(64)


@njit(nogil=True, error_model="numpy")
def _pack_queries(call, first_token, head, count, rows, place):
    """Rows behind `count` are zeros."""
    rotated, depth, group = at(float32, call[ROTATED]), call[HEAD_DIM], call[GROUP]
    codes, scales, starts = at(int8, place[QUERY_BYTES]), at(float32, place[QUERY_SCALES]), at(int32, place[QUERY_STARTS])
    for row in range(rows):
        source = ((first_token + row // group) * call[NUM_HEADS] + head * group + row % group) * depth
        top = splat(F, np.float32(0))
        for c in range(0, depth if row < count else 0, 16):
            top = vmax(top, vabs(load(F, rotated, source + c)))
        scales[row] = hmax(top) * (LOG2E / np.float32(127))
        inverse, total = splat(F, np.float32(127) / max(hmax(top), TINY)), zeros(I, 1)[0]
        for c in range(0, depth, 16):
            code = zeros(I, 1)[0]
            if row < count:
                code = nearest(load(F, rotated, source + c) * inverse)[0]
            total += code
            store(codes, row * depth + c, convert(B, code))
        starts[row] = BIAS - MIDDLE * hsum(total)


@njit(nogil=True, error_model="numpy")
def _score(place, top, depth, lanes):
    """Scores of ROWS rows from `top` on."""
    keys, key_scales, scores = at(uint8, place[KEY_BYTES]), at(float32, place[KEY_SCALES]), at(float32, place[SCORES])
    queries, scales, starts = at(int8, place[QUERY_BYTES]), at(float32, place[QUERY_SCALES]), at(int32, place[QUERY_STARTS])
    steps = depth // 4
    for i in range(0, lanes, BLOCK):
        acc = broadcast_rows(I, ROWS, COLUMNS, starts, top)
        for s in range(steps):
            v = load_tile(U, COLUMNS, keys, (i // BLOCK * steps + s) * 64 * COLUMNS, 64)
            acc = outer_dot_rows(acc, v, queries, top * depth + 4 * s, depth)
        total = outer_fma(zeros(F, TILE), acc, load_tile(F, COLUMNS, key_scales, i, 16), scales, top)
        store_tile(scores, i, STRIDE, 16, COLUMNS, total)


@njit(nogil=True, error_model="numpy")
def _hide(scores, first, lanes, slots, low, high):
    """-inf for slots outside low ... high."""
    hidden = splat(F, np.float32(-np.inf))
    for i in range(0, lanes, 16):
        slot = load(I, slots, i)
        x = where_less(slot, splat(I, np.int32(high)), load(F, scores, first + i), hidden)
        store(scores, first + i, where_less(slot, splat(I, np.int32(low)), hidden, x))


@njit(nogil=True, error_model="numpy")
def _power(x):
    """2^x to 1e-4 relative, for x up to 100; what lies below -126 becomes next to nothing."""
    x = vmax(splat(F, np.float32(-126)), x)  # in this order NaN stays
    n = convert(I, x)
    r = x - convert(F, n)
    p = fma(r, splat(F, np.float32(0.05550411)), splat(F, np.float32(0.24022651)))
    p = fma(p, r, splat(F, np.float32(0.69314718)))
    p = fma(p, r, splat(F, np.float32(1)))
    return bitcast(F, bitcast(I, p) + (n << 23))


@njit(nogil=True, error_model="numpy")
def _share_scales(place, lanes):
    """Values' scales as parts of WEIGHT_TOP of the largest: times weights up to 1 they are codes -> the largest / WEIGHT_TOP."""
    scales, parts, most = at(float32, place[VALUE_SCALES]), at(float32, place[VALUE_PARTS]), splat(F, TINY)
    for i in range(0, lanes, 16):
        most = vmax(most, load(F, scales, i))
    factor = WEIGHT_TOP / hmax(most)
    for i in range(0, lanes, 16):
        store(parts, i, load(F, scales, i) * factor)
    return hmax(most) / WEIGHT_TOP


@njit(nogil=True, error_model="numpy")
def _soften(place, row, r, lanes, width, unit):
    """Row r of the scores, logarithms to base 2, to weights: 1 for the largest of these lanes, and times their values' scales to bytes.
    tops[row] is near the largest score so far and moves as in attention_softmax.soften. unit: what _share_scales gave."""
    scores, first, tops, sums = at(float32, place[SCORES]), r * STRIDE, at(float32, place[TOPS]), at(float32, place[SUMS])
    parts, codes = at(float32, place[VALUE_PARTS]), at(int8, place[WEIGHT_BYTES])
    best = splat(F, LOWEST_SCORE)
    for i in range(0, lanes, 16):
        best = vmax(best, load(F, scores, first + i))
    top = hmax(best)
    if top > tops[row] + SLACK:
        out = at(float32, place[WEIGHTED])
        factor = _power(splat(F, tops[row] - top))
        tops[row] = top
        store(sums, row * 16, load(F, sums, row * 16) * factor)
        for c in range(row * width, (row + 1) * width, 16):
            store(out, c, load(F, out, c) * factor)
    shift, total = splat(F, top), splat(F, np.float32(0))
    for i in range(0, lanes, 16):
        weight = _power(load(F, scores, first + i) - shift)
        total += weight
        store(codes, r * KEYS + i, convert(B, nearest(weight * load(F, parts, i))[0]))
    share = _power(splat(F, top - tops[row]))
    store(sums, row * 16, fma(total, share, load(F, sums, row * 16)))
    store(at(float32, place[WEIGHT_SCALES]), r, share * unit)  # all lanes: the next rows come later


@njit(nogil=True, error_model="numpy")
def _weigh(place, top, lanes, width):
    """Add ROWS rows of weights times values to what lies from row `top` on."""
    values, codes, out = at(uint8, place[VALUE_BYTES]), at(int8, place[WEIGHT_BYTES]), at(float32, place[WEIGHTED])
    scales, starts = at(float32, place[WEIGHT_SCALES]), at(int32, place[WEIGHT_STARTS])
    ones = load_tile(F, COLUMNS, at(float32, place[ONES]), 0, 16)
    for c in range(0, width, BLOCK):
        acc = broadcast_rows(I, ROWS, COLUMNS, starts, 0)
        for quad in range(lanes // 4):
            v = load_tile(U, COLUMNS, values, quad * 4 * width + 4 * c, 64)
            acc = outer_dot_codes(acc, v, codes, 4 * quad, KEYS)
        total = load_rows(F, ROWS, COLUMNS, out, top * width + c, width, 16)
        store_tile(out, top * width + c, width, 16, COLUMNS, outer_fma(total, acc, ones, scales, 0))


@njit(nogil=True, error_model="numpy")
def _attend_lanes(call, place, count, tiles, slot, lanes):
    """All rows against the tokens in the scratch; `slot` is the block's first token's."""
    group, depth, width, slots, scores = call[GROUP], call[HEAD_DIM], call[WIDTH], at(int32, place[SLOTS]), at(float32, place[SCORES])
    least, most = UNSEEN, np.int32(0)
    for i in range(lanes):
        least, most = min(least, slots[i]), max(most, slots[i])
    unit = _share_scales(place, lanes)
    for tile in range(tiles):
        top, tail = tile * ROWS, min(tile * ROWS + ROWS, count) - 1
        if least > slot + tail // group:
            continue
        _score(place, top, depth, lanes)
        for row in range(top, tail + 1):
            last = slot + row // group
            if most > last or call[WINDOW] > 0:
                _hide(scores, (row - top) * STRIDE, lanes, slots, first_visible(call, last), last + 1)
            _soften(place, row, row - top, lanes, width, unit)
        _weigh(place, top, lanes, width)


@njit(nogil=True, error_model="numpy")
def _mean_score(call, token, head, member, mean):
    """What all scores of a row are too small by."""
    q, total = at(float32, call[ROTATED]), splat(F, np.float32(0))
    first = (token * call[NUM_HEADS] + head * call[GROUP] + member) * call[HEAD_DIM]
    for c in range(0, call[HEAD_DIM], 16):
        total = fma(load(F, q, first + c), load(F, mean, c), total)
    return hsum(total)


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
    out, sums, tops, ones = (at(float32, place[WEIGHTED]), at(float32, place[SUMS]), at(float32, place[TOPS]), at(float32, place[ONES]))
    mean_key(call, row + begin, tokens, head, at(float32, place[MEAN]))
    _pack_queries(call, row + begin, head, count, tiles * ROWS, place)
    for i in range(tiles * ROWS):
        tops[i] = LOWEST_SCORE
        store(sums, 16 * i, splat(F, np.float32(0)))
    for i in range(tiles * ROWS * width):
        out[i] = 0
    for i in range(BLOCK):
        ones[i] = 1
    for i in range(ROWS):
        at(int32, place[WEIGHT_STARTS])[i] = BIAS
    high, pages, columns, lists, start = slot + tokens, np.int64(0), np.int64(0), at(int64, call[PREFILL_LISTS])[sequence], np.int64(0)
    first = first_visible(call, slot) // PAGE
    table = at(int32, lists)
    if lists:
        first_list = 2 * (head * ((rows + size - 1) // size) + block)
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
            _attend_lanes(call, place, count, tiles, slot, lane)
            lane = np.int64(0)
    if lane:
        _attend_lanes(call, place, count, tiles, slot, lane)
    for i in range(count):
        token = row + begin + i // group
        to = token * call[OUT_STRIDE] + (head * group + i % group) * call[HEAD_DIM]
        total, best = hsum(load(F, sums, i * 16)), tops[i] * LN2 + _mean_score(call, token, head, i % group, at(float32, place[MEAN]))
        finish_row(call, sequence, head, token, i % group, total, best, out, i * width, at(float32, call[OUT]), to)
