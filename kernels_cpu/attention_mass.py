"""How much attention cached tokens receive: the statistic that eviction policies and ZipCache's saliency ask for.

The last PROBES rows of each sequence are scored once more against all slots of a KV head; their softmax weights, summed over the
group's query heads, go to the sequence's mass: float32 [planes][layers][kv_heads][slots]. MASS_MODE tells which planes there are:
SUM, the mass of all probes since a token came and how many of them could see it; LAST, the mass of the newest call's probes alone.
"""
import numpy as np
from numba import float32, int64, njit

from edgeattn.kernels_cpu.attention_call import (CHUNK, GROUP, HEAD_DIM, KV_HEADS, LAYER, MASS, MASS_MODE, MASS_PLANE, MAX_PAGES, NUM_HEADS,
                                                 PAGE, PROBES, ROTATED, entry_of, first_visible, rows_of, slots_of)
from edgeattn.kernels_cpu.attention_decode import hide, score_page
from edgeattn.kernels_cpu.attention_fold import OUT, SCORES, STRIDE, SUMS, TOPS, places, prepare_queries
from edgeattn.kernels_cpu.attention_softmax import LOWEST_SCORE, soften
from edgeattn.kernels_cpu.floats import F, exp_low
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, hsum, load, splat, store

SUM, LAST = 1, 2  # bits of MASS_MODE


@njit(nogil=True, error_model="numpy")
def _queries(call, head, row):
    return call[ROTATED] + 4 * (row * call[NUM_HEADS] + head * call[GROUP]) * call[HEAD_DIM]


@njit(nogil=True, error_model="numpy")
def _scores(call, place, sequence, head, row, first, low, high):
    """Scores of the query row with the slots of one chunk of pages."""
    q, scores = _queries(call, head, row), at(float32, place[SCORES])
    last = (high + PAGE - 1) // PAGE
    for page in range(first, min(first + CHUNK // PAGE, last)):
        entry, to = entry_of(call, sequence, head, page), (page - first) * PAGE
        if entry < 0:
            hide(scores, call[GROUP], to, 0, 0, 0)
        else:
            score_page(call, place, entry, entry, q, False, to)
            hide(scores, call[GROUP], to, page * PAGE, low, high)
    return (min(first + CHUNK // PAGE, last) - first) * PAGE


@njit(nogil=True, error_model="numpy")
def _probe(call, place, sequence, head, row, slot, total_mass, seen, last_mass):
    group, low, high = call[GROUP], first_visible(call, slot), slot + 1
    scores, out, sums, tops = at(float32, place[SCORES]), at(float32, place[OUT]), at(float32, place[SUMS]), at(float32, place[TOPS])
    prepare_queries(call, place, _queries(call, head, row), True)
    for h in range(group):
        tops[h] = LOWEST_SCORE
        store(sums, 16 * h, splat(F, np.float32(0)))
    for first in range(low // PAGE, (high + PAGE - 1) // PAGE, CHUNK // PAGE):
        count = _scores(call, place, sequence, head, row, first, low, high)
        for h in range(group):
            soften(scores, h * STRIDE, h * STRIDE + count, tops, sums, h, out, 0, 0)
    for first in range(low // PAGE, (high + PAGE - 1) // PAGE, CHUNK // PAGE):
        count = _scores(call, place, sequence, head, row, first, low, high)
        for i in range(0, count, 16):
            total, slots = splat(F, np.float32(0)), first * PAGE + i
            for h in range(group):
                weight = exp_low(load(F, scores, h * STRIDE + i) - tops[h])
                total += weight * (np.float32(1) / hsum(load(F, sums, 16 * h)))
            if call[MASS_MODE] & SUM:
                store(total_mass, slots, load(F, total_mass, slots) + total)
            if call[MASS_MODE] & LAST:
                store(last_mass, slots, load(F, last_mass, slots) + total)
    if call[MASS_MODE] & SUM:
        for i in range(low, high):
            seen[i] += 1


@worker
def probe_head(call, sequence, first, head, thread):
    """All probe rows of a sequence for one KV head."""
    start, rows = rows_of(call, sequence)
    slots, at_head = slots_of(call, sequence, head), (call[LAYER] * call[KV_HEADS] + head) * call[MAX_PAGES] * PAGE
    base, plane = at(int64, call[MASS])[sequence] + 4 * at_head, 4 * call[MASS_PLANE]
    last = at(float32, base + (2 * plane if call[MASS_MODE] & SUM else 0))
    if call[MASS_MODE] & LAST:
        for i in range(slots):
            last[i] = 0
    place = places(call, thread)
    for i in range(max(0, rows - call[PROBES]), rows):
        _probe(call, place, sequence, head, start + i, slots - rows + i, at(float32, base), at(float32, base + plane), last)
