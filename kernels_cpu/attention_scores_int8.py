"""Rows of queries against tokens that lie as bytes in a thread's scratch (attention_bytes.py): their scores, softmax and weighted values.

Sums of products are integers, all else is float32; codes of keys have MIDDLE added, so their sums start at -MIDDLE times the sum of the
query's. Scores are logarithms to base 2. A row's weights get the values' scales and become bytes too, with one scale for each row and KEYS
tokens. The running softmax is FlashAttention's (arXiv 2205.14135).
"""
import numpy as np
from numba import float32, int8, int32, njit, uint8

from edgeattn.kernels_cpu.attention_bytes import (KEY_BYTES, KEY_SCALES, MIDDLE, ONES, QUERY_BYTES, QUERY_SCALES, QUERY_STARTS, ROWS,
                                                  SCORES, SLOTS, STRIDE, SUMS, TINY, TOPS, UNSEEN, VALUE_BYTES, VALUE_PARTS, VALUE_SCALES,
                                                  WEIGHT_BYTES, WEIGHT_SCALES, WEIGHT_STARTS, WEIGHTED)
from edgeattn.kernels_cpu.attention_call import GROUP, HEAD_DIM, KEYS, NUM_HEADS, ROTATED, WIDTH, WINDOW, first_visible
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, SLACK
from edgeattn.kernels_cpu.float_tiles import BLOCK, COLUMNS
from edgeattn.kernels_cpu.floats import F, I, where_less
from edgeattn.kernels_cpu.simd import (BIAS, CODE_TOP, at, bitcast, broadcast_rows, convert, fma, hmax, hsum, i8, load, load_rows,
                                       load_tile, nearest, outer_dot_codes, outer_dot_rows, outer_fma, splat, store,
                                       store_tile, u8, vabs, vmax, zeros)

TILE, WEIGHT_TOP = ROWS * COLUMNS, np.float32(CODE_TOP)
LOG2E = np.float32(1.4426950408889634)
B, U = i8(16), u8(64)


@njit(nogil=True, error_model="numpy")
def pack_queries(call, first_token, head, count, rows, place):
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
def _soften(place, row, r, lanes, width, unit, bias, skip):
    """Row r of the scores, logarithms to base 2, to weights: 1 for the largest of these lanes, and times their values' scales to bytes.
    tops[row] is near the largest score so far and moves as in attention_softmax.soften. unit: what _share_scales gave; bias is added to all
    scores. -> whether they count: the largest is less than `skip` below tops[row] (SpargeAttn's second stage, arXiv 2502.18137)."""
    scores, first, tops, sums = at(float32, place[SCORES]), r * STRIDE, at(float32, place[TOPS]), at(float32, place[SUMS])
    parts, codes = at(float32, place[VALUE_PARTS]), at(int8, place[WEIGHT_BYTES])
    best = splat(F, LOWEST_SCORE)
    for i in range(0, lanes, 16):
        best = vmax(best, load(F, scores, first + i))
    top = hmax(best) + bias
    if top <= tops[row] - skip:
        at(float32, place[WEIGHT_SCALES])[r] = 0  # whatever its codes are
        return False
    if top > tops[row] + SLACK:
        out = at(float32, place[WEIGHTED])
        factor = _power(splat(F, tops[row] - top))
        tops[row] = top
        store(sums, row * 16, load(F, sums, row * 16) * factor)
        for c in range(row * width, (row + 1) * width, 16):
            store(out, c, load(F, out, c) * factor)
    shift, total = splat(F, top - bias), splat(F, np.float32(0))
    for i in range(0, lanes, 16):
        weight = _power(load(F, scores, first + i) - shift)
        total += weight
        store(codes, r * KEYS + i, convert(B, nearest(weight * load(F, parts, i))[0]))
    share = _power(splat(F, top - tops[row]))
    store(sums, row * 16, fma(total, share, load(F, sums, row * 16)))
    store(at(float32, place[WEIGHT_SCALES]), r, share * unit)  # all lanes: the next rows come later
    return True


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
def attend_lanes(call, place, count, slot, lanes, bias, skip):
    """The first `count` rows against the tokens in the scratch; `slot` is the block's first token's."""
    group, depth, width, slots, scores = call[GROUP], call[HEAD_DIM], call[WIDTH], at(int32, place[SLOTS]), at(float32, place[SCORES])
    least, most = UNSEEN, np.int32(0)
    for i in range(lanes):
        least, most = min(least, slots[i]), max(most, slots[i])
    unit = _share_scales(place, lanes)
    for tile in range((count + ROWS - 1) // ROWS):
        top, tail, counts = tile * ROWS, min(tile * ROWS + ROWS, count) - 1, False
        if least > slot + tail // group:
            continue
        _score(place, top, depth, lanes)
        for row in range(top, tail + 1):
            last = slot + row // group
            if most > last or call[WINDOW] > 0:
                _hide(scores, (row - top) * STRIDE, lanes, slots, first_visible(call, last), last + 1)
            counts |= _soften(place, row, row - top, lanes, width, unit, bias, skip)
        if counts:
            _weigh(place, top, lanes, width)
