"""Cached tokens as bytes, for prefill in 8 bits: pages or single tokens into a scratch that stays in the first caches.

A key has one scale, after the mean of some newer keys was taken away; a value has one too. Values are signed bytes. Keys are codes from 1
to as many as the machine's dot product takes, MIDDLE standing for 0.
"""
import numpy as np
from numba import float32, int32, int64, njit

from edgeattn.kernels_cpu.attention_call import (HEAD_DIM, KEYS, KEYS_ROTATED, KV_HEADS, MAX_PAGES, PAGE, PLACE, POOLS, WIDTH, entry_of)
from edgeattn.kernels_cpu.float_tiles import BLOCK, COLUMNS, ROWS as FLOAT_ROWS
from edgeattn.kernels_cpu.floats import F, I, divide
from edgeattn.kernels_cpu.page_expand import expand_keys, expand_values
from edgeattn.kernels_cpu.simd import CODE_TOP, at, hmax, load, nearest, splat, store, vabs, vmax, zeros

ROWS = min(FLOAT_ROWS, 6)  # of a register tile: LLVM loads the rows' words early and would spill more
STRIDE = KEYS + 16         # floats of a row of scores
MIDDLE = np.int32((CODE_TOP + 1) // 2)
KEY_TOP, VALUE_TOP = np.float32(MIDDLE - 1), np.float32(127)
UNSEEN = np.int32(2 ** 31 - 1)  # slot of a lane without a token
TINY = np.float32(1e-30)
# What lies in a thread's scratch; all but the last are addresses.
(KEY_BYTES, KEY_SCALES, VALUE_BYTES, VALUE_SCALES, VALUE_PARTS, SLOTS, MEAN, QUERY_BYTES, QUERY_SCALES, QUERY_STARTS, SUMS, TOPS,
 WEIGHTED, SCORES, WEIGHT_BYTES, WEIGHT_SCALES, WEIGHT_STARTS, ONES, PAGE_KEYS, PAGE_VALUES, OTHER_KEYS, OTHER_VALUES, PARAMS, SPREAD,
 PARTS) = range(25)


@njit(nogil=True, error_model="numpy")
def places(call, task, rows):
    """The addresses, in the order of their names, each on a 64-byte boundary."""
    depth, width = call[HEAD_DIM], call[WIDTH]
    sizes = (KEYS * depth, 4 * KEYS, KEYS * width, 4 * KEYS, 4 * KEYS, 4 * KEYS, 4 * depth, rows * depth, 4 * rows, 4 * rows, 64 * rows,
             4 * rows, 4 * rows * width, 4 * ROWS * STRIDE, ROWS * KEYS, 4 * (ROWS + 16), 4 * ROWS, 4 * BLOCK, 4 * PAGE * depth,
             4 * PAGE * width, 4 * PAGE * depth, 4 * PAGE * width, 16 * width, 0)
    found, end = at(int64, task + PLACE), (task + PLACE + 8 * PARTS + 63) // 64 * 64
    for i in range(SPREAD):
        found[i] = end
        end += (sizes[i] + 63) // 64 * 64
    found[SPREAD] = -1
    return found


@njit(nogil=True, error_model="numpy")
def mean_key(call, row, count, head, mean):
    """Of the new tokens row ... row + count."""
    keys, depth = at(float32, call[KEYS_ROTATED]), call[HEAD_DIM]
    for c in range(0, depth, 16):
        total = splat(F, np.float32(0))
        for t in range(row, row + count):
            total += load(F, keys, (t * call[KV_HEADS] + head) * depth + c)
        store(mean, c, total * (np.float32(1) / np.float32(count)))


@njit(nogil=True, error_model="numpy")
def _pack_keys(keys, mean, depth, lane, place):
    """A page's keys [depth][32] to bytes [block of BLOCK tokens][quad of channels][token][channel], from token `lane` of the scratch on."""
    codes, scales, steps = at(int32, place[KEY_BYTES]), at(float32, place[KEY_SCALES]), depth // 4
    for half in range(0, PAGE, 16):
        top = splat(F, TINY)
        for c in range(depth):
            top = vmax(top, vabs(load(F, keys, c * PAGE + half) - splat(F, mean[c])))
        store(scales, lane + half, top * (np.float32(1) / KEY_TOP))
        inverse = divide(splat(F, KEY_TOP), top)
        block, column = (lane + half) // BLOCK, (lane + half) % BLOCK // 16
        for s in range(steps):
            word = zeros(I, 1)[0]
            for j in range(4):
                c = 4 * s + j
                code = nearest((load(F, keys, c * PAGE + half) - splat(F, mean[c])) * inverse)[0] + MIDDLE
                word = word | code << 8 * j
            store(codes, ((block * steps + s) * COLUMNS + column) * 16, word)


@njit(nogil=True, error_model="numpy")
def _pack_values(values, count, depth, width, lane, place):
    """A page's values [32][width], of which `count` tokens have some, to bytes [quad of tokens][channel][token]."""
    codes, scales = at(int32, place[VALUE_BYTES]), at(float32, place[VALUE_SCALES])
    for t in range(0, PAGE, 4):
        for j in range(4):
            top = splat(F, TINY)
            for c in range(0, depth if t + j < count else 0, 16):
                top = vmax(top, vabs(load(F, values, (t + j) * width + c)))
            scales[lane + t + j] = hmax(top) / VALUE_TOP if t + j < count else np.float32(0)
        for c in range(0, width, 16):
            word = zeros(I, 1)[0]
            for j in range(4):
                code = zeros(I, 1)[0]
                if t + j < count and c < depth:
                    code = nearest(load(F, values, (t + j) * width + c) * (np.float32(1) / scales[lane + t + j]))[0]
                word = word | (code & 255) << 8 * j
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
def take_page(call, task, sequence, head, page, high, lane, place):
    """A page to lanes `lane` ... lane + 32 -> whether it holds something."""
    depth, width, slots = call[HEAD_DIM], call[WIDTH], at(int32, place[SLOTS])
    count = _expand(call, task, sequence, head, page, high, place[PAGE_KEYS], place[PAGE_VALUES], place[PARAMS])
    if count:
        _pack_keys(at(float32, place[PAGE_KEYS]), at(float32, place[MEAN]), depth, lane, place)
        _pack_values(at(float32, place[PAGE_VALUES]), count, depth, width, lane, place)
        for t in range(PAGE):
            slots[lane + t] = page * PAGE + t if t < count else UNSEEN
    return count > 0


@njit(nogil=True, error_model="numpy")
def take_mean(call, head, page, means, taken, lane, place):
    """A page's means, from address `means` on (page_means.py), as token `taken` of a page that is yet to be packed."""
    depth, width, slots = call[HEAD_DIM], call[WIDTH], at(int32, place[SLOTS])
    keys, values = at(float32, place[PAGE_KEYS]), at(float32, place[PAGE_VALUES])
    held = at(float32, means + 4 * (head * call[MAX_PAGES] + page) * (depth + width))
    for c in range(depth):
        keys[c * PAGE + taken] = held[c]
    for c in range(0, width, 16):
        store(values, taken * width + c, load(F, held, depth + c))
    slots[lane + taken] = page * PAGE


@njit(nogil=True, error_model="numpy")
def pack_means(call, taken, lane, place):
    """The means taken so far to lanes `lane` ... lane + 32 -> 32"""
    slots = at(int32, place[SLOTS])
    for t in range(taken, PAGE):
        slots[lane + t] = UNSEEN
    _pack_keys(at(float32, place[PAGE_KEYS]), at(float32, place[MEAN]), call[HEAD_DIM], lane, place)
    _pack_values(at(float32, place[PAGE_VALUES]), taken, call[HEAD_DIM], call[WIDTH], lane, place)
    return PAGE


@njit(nogil=True, error_model="numpy")
def take_columns(call, task, sequence, head, columns, first, last, high, lane, place):
    """Up to 32 single tokens, columns[first] ... columns[last], to lanes as if they were a page."""
    depth, width, slots = call[HEAD_DIM], call[WIDTH], at(int32, place[SLOTS])
    keys, values = at(float32, place[PAGE_KEYS]), at(float32, place[PAGE_VALUES])
    other_keys, other_values, count = at(float32, place[OTHER_KEYS]), at(float32, place[OTHER_VALUES]), np.int64(0)
    for i in range(first, last):
        slot = np.int64(columns[i])
        page = slot // PAGE
        if page != place[SPREAD]:
            held = _expand(call, task, sequence, head, page, high, place[OTHER_KEYS], place[OTHER_VALUES], place[PARAMS])
            place[SPREAD] = page if held else -1
        if place[SPREAD] >= 0:
            for c in range(depth):
                keys[c * PAGE + count] = other_keys[c * PAGE + slot % PAGE]
            for c in range(0, width, 16):
                store(values, count * width + c, load(F, other_values, slot % PAGE * width + c))
            slots[lane + count] = slot
            count += 1
    for t in range(count, PAGE):
        slots[lane + t] = UNSEEN
    if count:
        _pack_keys(keys, at(float32, place[MEAN]), depth, lane, place)
        _pack_values(values, count, depth, width, lane, place)
    return count > 0
