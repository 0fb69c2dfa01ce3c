"""Values that decode leaves out because no score of their page passes a threshold (Top-Theta, arXiv 2502.08363).

A query head's threshold is alpha + beta * ln n for n tokens; [num_heads][2] float32 of a layer hold them. All scores count in the softmax's
sum, so that the weights of the values that are read stay what they are without a threshold. What the others are short of may be given
back as their weight times the mean of all values: of each layer and KV head a sequence then holds, as float32, how many slots were added,
how many of those had values, and the sums of the values [head_dim].
"""
import numpy as np
from numba import float32, int64, njit

from edgeattn.kernels_cpu.attention_call import (GROUP, HEAD_DIM, KV_HEADS, LAYER, PAGE, PLACE, POOLS, SCRATCH, SELECTIONS, THRESHOLDS,
                                                 VALUE_SUMS, WIDTH, entry_of, slots_of)
from edgeattn.kernels_cpu.attention_fold import DROPPED, PEAKS, SCORES, STRIDE, TOPS
from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_expand import expand_values
from edgeattn.kernels_cpu.simd import at, hmax, hsum, load, splat, store, vmax

OLD_TOPS = 4  # of a head's floats at DROPPED: where the maximum before a chunk stands


@njit(nogil=True, error_model="numpy")
def thresholds_of(call, sequence, head):
    """Address of the thresholds of a KV head's group; 0 where every value is read."""
    if call[THRESHOLDS] == 0 or at(int64, call[SELECTIONS])[sequence] == 0:
        return np.int64(0)
    return call[THRESHOLDS] + 8 * head * call[GROUP]


@njit(nogil=True, error_model="numpy")
def passing_pages(call, place, thresholds, count, slots):
    """Bits of those among a chunk's `count` pages that hold a score which some query head's threshold lets pass, or its best so far: so the
    best of all is never left out. -1 where all do."""
    scores, tops = at(float32, place[SCORES]), at(float32, place[TOPS])
    peaks, dropped = at(float32, place[PEAKS]), at(float32, place[DROPPED])
    curves, log, passing = at(float32, thresholds), np.log(np.float32(slots)), np.int64(0)
    for h in range(call[GROUP]):
        limit, best = curves[2 * h] + curves[2 * h + 1] * log, -1
        for page in range(count):
            i = h * STRIDE + page * PAGE
            top = hmax(vmax(load(F, scores, i), load(F, scores, i + 16)))
            if top >= limit:
                passing |= np.int64(1) << page
            if top > peaks[h]:
                peaks[h], best = top, page
        if best >= 0:
            passing |= np.int64(1) << best
        dropped[8 * h + OLD_TOPS] = tops[h]
    return np.int64(-1) if passing == (np.int64(1) << count) - 1 else passing


@njit(nogil=True, error_model="numpy")
def note_dropped(call, place, passing, count):
    """After soften: add to the weight that each head leaves out."""
    weights, tops, dropped = at(float32, place[SCORES]), at(float32, place[TOPS]), at(float32, place[DROPPED])
    for h in range(call[GROUP]):
        if tops[h] != dropped[8 * h + OLD_TOPS]:
            dropped[8 * h] *= np.exp(dropped[8 * h + OLD_TOPS] - tops[h])
        total = splat(F, np.float32(0))
        for page in range(count):
            if not passing >> page & 1:
                i = h * STRIDE + page * PAGE
                total += load(F, weights, i) + load(F, weights, i + 16)
        dropped[8 * h] += hsum(total)


@njit(nogil=True, error_model="numpy")
def _sums(call, sequence, head):
    """The head's row, with the slots in it that came since the last time."""
    depth, width, slots = call[HEAD_DIM], call[WIDTH], slots_of(call, sequence, head)
    held = at(float32, at(int64, call[VALUE_SUMS])[sequence] + 4 * (call[LAYER] * call[KV_HEADS] + head) * (2 + depth))
    task = call[SCRATCH]
    params = task + PLACE
    values = at(float32, params + 256)
    slot = np.int64(held[0])
    while slot < slots:
        page = slot // PAGE
        entry, end = entry_of(call, sequence, head, page), min(slots, (page + 1) * PAGE)
        if entry >= 0:  # a released page has none
            expand_values(call[POOLS], width, task, entry, end - page * PAGE, params + 256, params)
            for t in range(slot - page * PAGE, end - page * PAGE):
                for c in range(depth):
                    held[2 + c] += values[t * width + c]
            held[1] += np.float32(end - slot)
        slot = end
    held[0] = slots
    return held


@njit(nogil=True, error_model="numpy")
def add_mean(call, sequence, head, share, out, to):
    """out[to ...] += share * the mean of the head's values."""
    if call[VALUE_SUMS] == 0 or at(int64, call[VALUE_SUMS])[sequence] == 0:
        return
    held = _sums(call, sequence, head)
    factor = splat(F, share / max(held[1], np.float32(1)))
    for c in range(0, call[HEAD_DIM], 16):
        store(out, to + c, load(F, out, to + c) + load(F, held, 2 + c) * factor)
