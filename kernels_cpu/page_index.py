"""The index of a sequence: for each logical page of a KV head a row of halves that page scores read in place of the keys.

Rows are made when they are needed, from the keys as the cache gives them back: `indexed` says how many of a head's pages have good ones.
Whatever moves tokens between pages, or pages within a list, lowers it. Whole blocks of pages are described together, by a vector that
takes the room of all their rows.
    bounds           [pages][2][head_dim]: the smallest key of each channel, and how far the largest lies above it, rounded outward (Quest,
                     2406.10774)
    hierarchy        bounds, unless quantised pages know theirs, and behind those of all pages [blocks][head_dim]: mean keys of BLOCK pages
    representatives  [blocks][head_dim]: the mean of the TELLING keys of a block that are least like all of it (KeyDiff, 2504.15364)
    landmarks        [blocks][head_dim]: the key of the block's last token
    components       [pages][rank][32 tokens]: keys along the first principal components
    collisions       [pages][tables][32 tokens] bytes: on which side of random planes a key lies, centred by the mean key of the pages
                     CENTRE; so a page's row never depends on how many follow
"""
import numpy as np
from numba import float32, int32, njit, uint8, uint16

from edgeattn.kernels_cpu.attention_call import HEAD_DIM, KEYS_ROTATION, MAX_PAGES, POOLS, SCRATCH, SCRATCH_SIZE, entry_of
from edgeattn.kernels_cpu.floats import F, H, divide, from_half, half_towards, store_float
from edgeattn.kernels_cpu.hadamard import hadamard
from edgeattn.kernels_cpu.page_expand import expand_keys
from edgeattn.kernels_cpu.simd import at, convert, fma, hsum, load, splat, store, vmax, vmin
from edgeattn.kernels_cpu.steps import CODES
from edgeattn.page_formats import PAGE

TASK = 256  # bytes of scratch before its floats
BOUND, HIERARCHY, REPRESENTATIVES, LANDMARKS, COMPONENT_SCORES, COLLISIONS = (
    CODES[name] for name in ("bound", "hierarchy", "representatives", "landmarks", "components", "collisions"))
BLOCK = 4        # pages
TELLING = 4      # keys
CENTRE = (1, 5)  # pages


def index_width(index: str, head_dim: int, size: int, known: bool = False) -> int:
    """Halves for each page. size: pages of a block, components (0: a quarter of the channels) or tables;
    known: quantised pages have bounds themselves."""
    bounds = 0 if known else 2 * head_dim
    return {"": 0, "bounds": bounds, "hierarchy": bounds + -(-head_dim // BLOCK), "representatives": -(-head_dim // max(size, 1)),
            "landmarks": -(-head_dim // max(size, 1)), "components": PAGE * (size or head_dim // 4), "collisions": PAGE // 2 * size}[index]


@njit(nogil=True, error_model="numpy")
def keys_of(call, entry, thread):
    """A page's keys [32][head_dim] float32, without the rotation that only the cache knows, in the thread's scratch; -> their address."""
    depth, task = call[HEAD_DIM], call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]
    by_channel = task + TASK
    params = by_channel + 4 * PAGE * depth
    to = (params + 8 * depth + 63) // 64 * 64
    expand_keys(call[POOLS], depth, task, entry, by_channel, PAGE, 16, params)
    x, keys = at(float32, by_channel), at(float32, to)
    for t in range(PAGE):
        for c in range(depth):
            keys[t * depth + c] = x[c * PAGE + t]
        if call[KEYS_ROTATION]:  # its own inverse
            hadamard(keys, t * depth, depth)
    return to


@njit(nogil=True, error_model="numpy")
def _block_keys(call, sequence, head, first, last, thread):
    """The keys of up to BLOCK pages in a row, in scratch behind what keys_of needs -> (address, how many)."""
    depth, size = call[HEAD_DIM], PAGE * call[HEAD_DIM]
    to = call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE] + TASK + 8 * size + 8 * depth + 64
    many, count = at(float32, to), np.int64(0)
    for page in range(first, last):
        entry = entry_of(call, sequence, head, page)
        if entry >= 0:  # not released
            keys = at(float32, keys_of(call, entry, thread))
            for i in range(0, size, 16):
                store(many, count * depth + i, load(F, keys, i))
            count += PAGE
    return to, count


@njit(nogil=True, error_model="numpy")
def _bounds(keys, depth, row):
    for c in range(0, depth, 16):
        low = high = load(F, keys, c)
        for t in range(1, PAGE):
            x = load(F, keys, t * depth + c)
            low, high = vmin(low, x), vmax(high, x)
        bits = convert(H, half_towards(low, False))
        store(row, c, bits)
        store(row, depth + c, convert(H, half_towards(high - from_half(bits), True)))


@njit(nogil=True, error_model="numpy")
def _mean(keys, count, depth, to):
    """As halves or floats, by the type of `to`."""
    for c in range(0, depth, 16):
        total = splat(F, np.float32(0))
        for t in range(count):
            total += load(F, keys, t * depth + c)
        store_float(to, c, divide(total, splat(F, np.float32(max(count, 1)))))


@njit(nogil=True, error_model="numpy")
def _dot(a, first, b, second, depth):
    total = splat(F, np.float32(0))
    for c in range(0, depth, 16):
        total = fma(load(F, a, first + c), load(F, b, second + c), total)
    return hsum(total)


@njit(nogil=True, error_model="numpy")
def _representative(address, count, depth, row):
    """Behind the keys in scratch lie: one key's length to divide by, or its likeness; the mean direction; the chosen keys."""
    keys = at(float32, address)
    each, direction, chosen = count * depth, count * depth + count, count * depth + count + depth
    for c in range(0, depth, 16):
        store(keys, direction + c, splat(F, np.float32(0)))
    for t in range(count):
        keys[each + t] = np.float32(1) / max(np.sqrt(_dot(keys, t * depth, keys, t * depth, depth)), np.float32(1e-30))
        for c in range(0, depth, 16):
            store(keys, direction + c, fma(load(F, keys, t * depth + c), splat(F, keys[each + t]), load(F, keys, direction + c)))
    for t in range(count):
        keys[each + t] *= _dot(keys, t * depth, keys, direction, depth)
    for i in range(min(TELLING, count)):
        best = 0
        for t in range(1, count):
            best = t if keys[each + t] < keys[each + best] else best
        for c in range(0, depth, 16):
            store(keys, chosen + i * depth + c, load(F, keys, best * depth + c))
        keys[each + best] = np.inf
    _mean(at(float32, address + 4 * chosen), min(TELLING, count), depth, row)


@njit(nogil=True, error_model="numpy")
def _along(call, keys, components, rank, thread, row):
    """A page's keys along the components, token by token within each."""
    depth, x = call[HEAD_DIM], at(float32, call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE] + TASK)
    if call[KEYS_ROTATION]:  # by channel there are only the rotated ones
        for t in range(PAGE):
            for c in range(depth):
                x[c * PAGE + t] = keys[t * depth + c]
    for i in range(rank):
        a = b = splat(F, np.float32(0))
        for c in range(depth):
            e = splat(F, components[i * depth + c])
            a, b = fma(load(F, x, c * PAGE), e, a), fma(load(F, x, c * PAGE + 16), e, b)
        store_float(row, i * PAGE, a)
        store_float(row, i * PAGE + 16, b)


@njit(nogil=True, error_model="numpy")
def sides(x, at_x, planes, table, bits, depth):
    """The code of a vector in one table: a bit for each of its planes, set where the vector lies above."""
    code = np.int64(0)
    for bit in range(bits):
        code |= np.int64(_dot(x, at_x, planes, (table * bits + bit) * depth, depth) > 0) << bit
    return code


@njit(nogil=True, error_model="numpy")
def _signatures(keys, centre, planes, tables, bits, depth, row):
    for t in range(PAGE):
        for c in range(0, depth, 16):
            store(keys, t * depth + c, load(F, keys, t * depth + c) - load(F, centre, c))
        for table in range(tables):
            row[table * PAGE + t] = sides(keys, t * depth, planes, table, bits, depth)


@njit(nogil=True, error_model="numpy")
def block_at(call, kind, rows, width, block, number):
    """Address of what describes a block."""
    if kind == HIERARCHY:
        depth = call[HEAD_DIM]
        return rows + 2 * call[MAX_PAGES] * (width - (depth + BLOCK - 1) // BLOCK) + 2 * number * depth
    return rows + 2 * number * block * width


@njit(nogil=True, error_model="numpy")
def _index_block(call, sequence, head, last, kind, to, block, thread):
    """Describe the block that ends before page `last`."""
    row, depth = at(uint16, to), call[HEAD_DIM]
    if kind == LANDMARKS:
        entry = entry_of(call, sequence, head, last - 1)
        keys = keys_of(call, entry, thread) if entry >= 0 else np.int64(0)
        if keys:
            _mean(at(float32, keys + 4 * (PAGE - 1) * depth), 1, depth, row)
        return
    found, count = _block_keys(call, sequence, head, last - block, last, thread)
    if kind == HIERARCHY:
        _mean(at(float32, found), count, depth, row)
    else:
        _representative(found, count, depth, row)


@njit(nogil=True, error_model="numpy")
def index_pages(call, sequence, head, last, kind, rows, width, block, bits, components, done, thread):
    """Make the missing ones of the first `last` rows, `width` halves each, at address `rows`. done: address of the head's count; kind: of
    scores; the rest as select_pages has it."""
    count, depth, centre = at(int32, done), call[HEAD_DIM], np.int64(0)
    start = np.int64(count[0])
    if start >= last:
        return
    if kind == COLLISIONS:
        if last < CENTRE[1]:
            return
        start = start if start >= CENTRE[1] else 0
        found, tokens = _block_keys(call, sequence, head, CENTRE[0], CENTRE[1], thread)
        centre = found + 4 * tokens * depth
        _mean(at(float32, found), tokens, depth, at(float32, centre))
    by_block = HIERARCHY <= kind <= LANDMARKS
    if kind == HIERARCHY:
        block = BLOCK
    for page in range(start, last):
        entry, row = entry_of(call, sequence, head, page), rows + 2 * page * width
        if entry >= 0:  # a released page is never scored
            if kind == BOUND:
                _bounds(at(float32, keys_of(call, entry, thread)), depth, at(uint16, row))
            elif kind == HIERARCHY and width >= 2 * depth:
                _bounds(at(float32, keys_of(call, entry, thread)), depth, at(uint16, rows + 4 * page * depth))
            elif kind == COMPONENT_SCORES:
                _along(call, at(float32, keys_of(call, entry, thread)), at(float32, components), width // PAGE, thread, at(uint16, row))
            elif kind == COLLISIONS:
                _signatures(at(float32, keys_of(call, entry, thread)), at(float32, centre), at(float32, components), 2 * width // PAGE,
                            bits, depth, at(uint8, row))
        if by_block and (page + 1) % block == 0:
            _index_block(call, sequence, head, page + 1, kind, block_at(call, kind, rows, width, block, page // block), block, thread)
    count[0] = last
