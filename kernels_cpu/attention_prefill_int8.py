"""Prefill attention in 8 bits: a block of a sequence's newest tokens against cached tokens, for one KV head.

Rows are query tokens x heads of the group, so that K and V are shared. KEYS cached tokens at a time, in pages or one by one where a
list says so, become bytes in a scratch that stays in the cache: keys less the mean of the block's own (which adds the same to all scores
of a row: SageAttention, arXiv 2410.02367), a scale for each token; values, a scale for each token, which the weights of its scores
take over before they become bytes too, a scale for each row. Sums of products are integers, all else is float32.

Codes of keys and values are 1 ... 127, MIDDLE standing for 0, and start their sums at -MIDDLE times the sum of the other side's.
"""
import numpy as np
from numba import float32, int8, int32, int64, njit, uint8

from edgeattn.kernels_cpu.attention_call import (GROUP, HEAD_DIM, KEYS, KEYS_ROTATED, KV_HEADS, NUM_HEADS, OUT, OUT_STRIDE, PAGE, PLACE, POOLS,
                                                 PREFILL_LISTS, ROTATED, SCRATCH, SCRATCH_SIZE, WIDTH, WINDOW, block_tokens, entry_of, first_visible,
                                                 rows_of, slots_of)
from edgeattn.kernels_cpu.attention_compensation import finish_row
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, SLACK
from edgeattn.kernels_cpu.float_tiles import BLOCK, COLUMNS, ROWS, TILE
from edgeattn.kernels_cpu.floats import F, I, divide, where_less
from edgeattn.kernels_cpu.page_expand import expand_keys, expand_values
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import (BIAS, at, bitcast, broadcast_rows, convert, fma, hmax, hsum, i8, load, load_rows, load_tile, nearest, outer_dot_rows,
                                       outer_fma, splat, store, store_tile, u8, vabs, vmax, zeros)

STRIDE = KEYS + 16  # of a row of scores
MIDDLE, TOP = np.int32(64), np.float32(63)
UNSEEN = np.int32(2 ** 31 - 1)  # slot of a lane without a token
TINY = np.float32(1e-30)
LOG2E, LN2 = np.float32(1.4426950408889634), np.float32(0.6931471805599453)
B, U = i8(16), u8(64)
# What lies in a thread's scratch; all but the last are addresses.
(KEY_BYTES, KEY_SCALES, VALUE_BYTES, VALUE_SCALES, VALUE_PARTS, SLOTS, MEAN, QUERY_BYTES, QUERY_SCALES, QUERY_STARTS, SUMS, TOPS, WEIGHTED, SCORES, WEIGHT_BYTES,
 WEIGHT_SCALES, WEIGHT_STARTS, ONES, PAGE_KEYS, PAGE_VALUES, OTHER_KEYS, OTHER_VALUES, PARAMS, SPREAD, PARTS) = range(25)


@njit(nogil=True, error_model="numpy")
def _places(call, task, rows):
    """The addresses, in the order of their names, each on a 64-byte boundary."""
    depth, width = call[HEAD_DIM], call[WIDTH]
    sizes = (KEYS * depth, 4 * KEYS, KEYS * width, 4 * KEYS, 4 * KEYS, 4 * KEYS, 4 * depth, rows * depth, 4 * rows, 4 * rows, 64 * rows, 4 * rows,
             4 * rows * width, 4 * ROWS * STRIDE, ROWS * KEYS, 4 * (ROWS + 16), 4 * ROWS, 4 * BLOCK, 4 * PAGE * depth, 4 * PAGE * width,
             4 * PAGE * depth, 4 * PAGE * width, 16 * width, 0)
    places, end = at(int64, task + PLACE), (task + PLACE + 8 * PARTS + 63) // 64 * 64
    for i in range(SPREAD):
        places[i] = end
        end += (sizes[i] + 63) // 64 * 64
    places[SPREAD] = -1
    return places


@njit(nogil=True, error_model="numpy")
def _mean_key(call, row, count, head, mean):
    """Of the new tokens row ... row + count."""
    keys, depth = at(float32, call[KEYS_ROTATED]), call[HEAD_DIM]
    for c in range(0, depth, 16):
        total = splat(F, np.float32(0))
        for t in range(row, row + count):
            total += load(F, keys, (t * call[KV_HEADS] + head) * depth + c)
        store(mean, c, total * (np.float32(1) / np.float32(count)))


@njit(nogil=True, error_model="numpy")
def _pack_queries(call, first_token, head, count, rows, places):
    """Rows behind `count` are zeros."""
    rotated, depth, group = at(float32, call[ROTATED]), call[HEAD_DIM], call[GROUP]
    codes, scales, starts = at(int8, places[QUERY_BYTES]), at(float32, places[QUERY_SCALES]), at(int32, places[QUERY_STARTS])
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
def _pack_keys(keys, mean, depth, lane, places):
    """A page's keys [depth][32] to bytes [block of BLOCK tokens][quad of channels][token][channel], from token `lane` of the scratch on."""
    codes, scales, steps = at(int32, places[KEY_BYTES]), at(float32, places[KEY_SCALES]), depth // 4
    for half in range(0, PAGE, 16):
        top = splat(F, TINY)
        for c in range(depth):
            top = vmax(top, vabs(load(F, keys, c * PAGE + half) - splat(F, mean[c])))
        store(scales, lane + half, top * (np.float32(1) / TOP))
        inverse = divide(splat(F, TOP), top)
        block, column = (lane + half) // BLOCK, (lane + half) % BLOCK // 16
        for s in range(steps):
            word = zeros(I, 1)[0]
            for j in range(4):
                c = 4 * s + j
                code = nearest((load(F, keys, c * PAGE + half) - splat(F, mean[c])) * inverse)[0] + MIDDLE
                word = word | code << 8 * j
            store(codes, ((block * steps + s) * COLUMNS + column) * 16, word)


@njit(nogil=True, error_model="numpy")
def _pack_values(values, count, depth, width, lane, places):
    """A page's values [32][width], of which `count` tokens have some, to bytes [quad of tokens][channel][token]."""
    codes, scales = at(int32, places[VALUE_BYTES]), at(float32, places[VALUE_SCALES])
    for t in range(0, PAGE, 4):
        for j in range(4):
            top = splat(F, TINY)
            for c in range(0, depth if t + j < count else 0, 16):
                top = vmax(top, vabs(load(F, values, (t + j) * width + c)))
            scales[lane + t + j] = hmax(top) / TOP if t + j < count else np.float32(0)
        for c in range(0, width, 16):
            word = zeros(I, 1)[0]
            for j in range(4):
                code = splat(I, MIDDLE)
                if t + j < count and c < depth:
                    code = code + nearest(load(F, values, (t + j) * width + c) * (np.float32(1) / scales[lane + t + j]))[0]
                word = word | code << 8 * j
            store(codes, ((lane + t) // 4 * (width // 16) + c // 16) * 16, word)


@njit(nogil=True, error_model="numpy")
def _expand(call, task, sequence, head, page, high, keys, values, params):
    """A page as floats -> how many of its tokens lie below slot `high`; 0 if it was released."""
    entry, count = entry_of(call, sequence, head, page), min(PAGE, high - page * PAGE)
    if entry < 0 or count <= 0:
        return np.int64(0)
    expand_keys(call[POOLS], call[HEAD_DIM], task, entry, keys, PAGE, 16, params)
    expand_values(call[POOLS], call[WIDTH], task, entry, count, values, params)
    return np.int64(count)


@njit(nogil=True, error_model="numpy")
def _take_page(call, task, sequence, head, page, high, lane, places):
    """A page to lanes `lane` ... lane + 32 -> whether it holds something."""
    depth, width, slots = call[HEAD_DIM], call[WIDTH], at(int32, places[SLOTS])
    count = _expand(call, task, sequence, head, page, high, places[PAGE_KEYS], places[PAGE_VALUES], places[PARAMS])
    if count:
        _pack_keys(at(float32, places[PAGE_KEYS]), at(float32, places[MEAN]), depth, lane, places)
        _pack_values(at(float32, places[PAGE_VALUES]), count, depth, width, lane, places)
        for t in range(PAGE):
            slots[lane + t] = page * PAGE + t if t < count else UNSEEN
    return count > 0


@njit(nogil=True, error_model="numpy")
def _take_columns(call, task, sequence, head, columns, first, last, high, lane, places):
    """Up to 32 single tokens, columns[first] ... columns[last], to lanes as if they were a page."""
    depth, width, slots = call[HEAD_DIM], call[WIDTH], at(int32, places[SLOTS])
    keys, values = at(float32, places[PAGE_KEYS]), at(float32, places[PAGE_VALUES])
    other_keys, other_values, count = at(float32, places[OTHER_KEYS]), at(float32, places[OTHER_VALUES]), np.int64(0)
    for i in range(first, last):
        slot = np.int64(columns[i])
        page = slot // PAGE
        if page != places[SPREAD]:
            held = _expand(call, task, sequence, head, page, high, places[OTHER_KEYS], places[OTHER_VALUES], places[PARAMS])
            places[SPREAD] = page if held else -1
        if places[SPREAD] >= 0:
            for c in range(depth):
                keys[c * PAGE + count] = other_keys[c * PAGE + slot % PAGE]
            for c in range(0, width, 16):
                store(values, count * width + c, load(F, other_values, slot % PAGE * width + c))
            slots[lane + count] = slot
            count += 1
    for t in range(count, PAGE):
        slots[lane + t] = UNSEEN
    if count:
        _pack_keys(keys, at(float32, places[MEAN]), depth, lane, places)
        _pack_values(values, count, depth, width, lane, places)
    return count > 0


@njit(nogil=True, error_model="numpy")
def _score(places, top, depth, lanes):
    """Scores of ROWS rows from `top` on."""
    keys, key_scales, scores = at(uint8, places[KEY_BYTES]), at(float32, places[KEY_SCALES]), at(float32, places[SCORES])
    queries, scales, starts = at(int8, places[QUERY_BYTES]), at(float32, places[QUERY_SCALES]), at(int32, places[QUERY_STARTS])
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
def _share_scales(places, lanes):
    """Values' scales as parts of 127 of the largest, by which weights up to 1 are multiplied to bytes -> the largest / 127."""
    scales, parts, most = at(float32, places[VALUE_SCALES]), at(float32, places[VALUE_PARTS]), splat(F, TINY)
    for i in range(0, lanes, 16):
        most = vmax(most, load(F, scales, i))
    factor = np.float32(127) / hmax(most)
    for i in range(0, lanes, 16):
        store(parts, i, load(F, scales, i) * factor)
    return hmax(most) / np.float32(127)


@njit(nogil=True, error_model="numpy")
def _soften(places, row, r, lanes, width, unit):
    """Row r of the scores, logarithms to base 2, to weights: 1 for the largest of these lanes, and times their values' scales to bytes. tops[row]
    is near the largest score so far and moves as in attention_softmax.soften. unit: what _share_scales gave."""
    scores, first, tops, sums = at(float32, places[SCORES]), r * STRIDE, at(float32, places[TOPS]), at(float32, places[SUMS])
    parts, codes = at(float32, places[VALUE_PARTS]), at(int8, places[WEIGHT_BYTES])
    best = splat(F, LOWEST_SCORE)
    for i in range(0, lanes, 16):
        best = vmax(best, load(F, scores, first + i))
    top = hmax(best)
    if top > tops[row] + SLACK:
        out = at(float32, places[WEIGHTED])
        factor = _power(splat(F, tops[row] - top))
        tops[row] = top
        store(sums, row * 16, load(F, sums, row * 16) * factor)
        for c in range(row * width, (row + 1) * width, 16):
            store(out, c, load(F, out, c) * factor)
    shift, total, count = splat(F, top), splat(F, np.float32(0)), zeros(I, 1)[0]
    for i in range(0, lanes, 16):
        weight = _power(load(F, scores, first + i) - shift)
        total += weight
        code = nearest(weight * load(F, parts, i))[0]
        count += code
        store(codes, r * KEYS + i, convert(B, code))
    share = _power(splat(F, top - tops[row]))
    store(sums, row * 16, fma(total, share, load(F, sums, row * 16)))
    store(at(float32, places[WEIGHT_SCALES]), r, share * unit)  # all lanes: the next rows come later
    at(int32, places[WEIGHT_STARTS])[r] = BIAS - MIDDLE * hsum(count)


@njit(nogil=True, error_model="numpy")
def _weigh(places, top, lanes, width):
    """Add ROWS rows of weights times values to what lies from row `top` on."""
    values, codes, out = at(uint8, places[VALUE_BYTES]), at(int8, places[WEIGHT_BYTES]), at(float32, places[WEIGHTED])
    scales, starts = at(float32, places[WEIGHT_SCALES]), at(int32, places[WEIGHT_STARTS])
    ones = load_tile(F, COLUMNS, at(float32, places[ONES]), 0, 16)
    for c in range(0, width, BLOCK):
        acc = broadcast_rows(I, ROWS, COLUMNS, starts, 0)
        for t in range(0, lanes, 4):
            v = load_tile(U, COLUMNS, values, (t // 4 * (width // 16) + c // 16) * 64, 64)
            acc = outer_dot_rows(acc, v, codes, t, KEYS)
        total = load_rows(F, ROWS, COLUMNS, out, top * width + c, width, 16)
        store_tile(out, top * width + c, width, 16, COLUMNS, outer_fma(total, acc, ones, scales, 0))


@njit(nogil=True, error_model="numpy")
def _attend_lanes(call, places, count, tiles, slot, lanes):
    """All rows against the tokens in the scratch; `slot` is the block's first token's."""
    group, depth, width, slots, scores = call[GROUP], call[HEAD_DIM], call[WIDTH], at(int32, places[SLOTS]), at(float32, places[SCORES])
    least, most = UNSEEN, np.int32(0)
    for i in range(lanes):
        least, most = min(least, slots[i]), max(most, slots[i])
    unit = _share_scales(places, lanes)
    for tile in range(tiles):
        top, tail = tile * ROWS, min(tile * ROWS + ROWS, count) - 1
        if least > slot + tail // group:
            continue
        _score(places, top, depth, lanes)
        for row in range(top, tail + 1):
            last = slot + row // group
            if most > last or call[WINDOW] > 0:
                _hide(scores, (row - top) * STRIDE, lanes, slots, first_visible(call, last), last + 1)
            _soften(places, row, row - top, lanes, width, unit)
        _weigh(places, top, lanes, width)


@worker
def attend_block_int8(call, sequence, head, block, thread):
    """Query tokens of one block of a sequence, all heads of the group of one KV head."""
    group, width, size = call[GROUP], call[WIDTH], block_tokens(call, sequence)
    row, rows = rows_of(call, sequence)
    begin = block * size
    tokens, slot = min(rows, begin + size) - begin, slots_of(call, sequence, head) - rows + begin
    count, tiles = tokens * group, (tokens * group + ROWS - 1) // ROWS
    task = call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]
    places = _places(call, task, tiles * ROWS)
    out, sums, tops, ones = (at(float32, places[WEIGHTED]), at(float32, places[SUMS]), at(float32, places[TOPS]), at(float32, places[ONES]))
    _mean_key(call, row + begin, tokens, head, at(float32, places[MEAN]))
    _pack_queries(call, row + begin, head, count, tiles * ROWS, places)
    for i in range(tiles * ROWS):
        tops[i] = LOWEST_SCORE
        store(sums, 16 * i, splat(F, np.float32(0)))
    for i in range(tiles * ROWS * width):
        out[i] = 0
    for i in range(BLOCK):
        ones[i] = 1
    high, pages, columns, lists, start = slot + tokens, np.int64(0), np.int64(0), at(int64, call[PREFILL_LISTS])[sequence], np.int64(0)
    first = first_visible(call, slot) // PAGE
    table = at(int32, lists)
    if lists:
        place = 2 * (head * ((rows + size - 1) // size) + block)
        start, pages, columns = np.int64(table[place]), np.int64(table[place + 1] - table[place]), np.int64(table[place + 2] - table[place + 1])
    else:
        pages = (high + PAGE - 1) // PAGE - first
    lane = np.int64(0)
    for i in range(pages + (columns + PAGE - 1) // PAGE):
        if i < pages:
            page = np.int64(table[start + i]) if lists else first + i
            lane += PAGE * _take_page(call, task, sequence, head, page, high, lane, places)
        else:
            j = start + pages + (i - pages) * PAGE
            lane += PAGE * _take_columns(call, task, sequence, head, table, j, min(j + PAGE, start + pages + columns), high, lane, places)
        if lane == KEYS:
            _attend_lanes(call, places, count, tiles, slot, lane)
            lane = np.int64(0)
    if lane:
        _attend_lanes(call, places, count, tiles, slot, lane)
    for i in range(count):
        token = row + begin + i // group
        to = token * call[OUT_STRIDE] + (head * group + i % group) * call[HEAD_DIM]
        finish_row(call, sequence, head, token, i % group, hsum(load(F, sums, i * 16)), tops[i] * LN2, out, i * width, at(float32, call[OUT]), to)
