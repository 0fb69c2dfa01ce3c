"""A call of select_pages: its arguments by name, which pages scores decide about, and where scores and lists lie."""
import numpy as np
from numba import float32, int32, int64, njit

from edgeattn.kernels_cpu import attention_call
from edgeattn.kernels_cpu.attention_call import (CHUNK, GROUP, HEAD_DIM, KV_HEADS, LAYER, MAX_PAGES, NUM_HEADS, ROTATED, SELECTION_CAPACITY,
                                                 SELECTION_GROUP, SELECTIONS, rows_of)
from edgeattn.kernels_cpu.page_index import COLLISIONS, HIERARCHY
from edgeattn.kernels_cpu.selections import list_at
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import CODES, as_f32
from edgeattn.page_formats import PAGE

ARGS = (*attention_call.ARGS, "batch.sealed", "batch.index", "batch.indexed", "selection.width", "selection.scores", "selection.shares",
        "selection.stats", "selection.scorer", "selection.finisher", "score", "combine", "budget", "fraction", "recent", "reach", "reuse",
        "selection.components", "block", "blocks", "bits", "cos.0")
(SEALED, INDEX, INDEXED, INDEX_WIDTH, PAGE_SCORES, SHARES, STATS, SCORER, FINISHER, SCORE, COMBINE, BUDGET, FRACTION, RECENT, REACH, REUSE,
 COMPONENTS, BLOCK, BLOCKS, BITS, COS_ROWS) = range(len(attention_call.ARGS), len(ARGS))
BOUND, MASS, RECENCY, RANDOM, PEAK, RANK, MAX_MASS = (
    CODES[name] for name in ("bound", "mass", "recency", "random", "peak", "rank", "max_mass"))
ALONE, BEST = CODES["head"], CODES["best"]
HALF = CHUNK // 2  # tokens that a finisher takes at once: half a row of scores


def rank_floats(group: int, pages: int) -> int:
    """Of one thread, where pages are ranked: each query head's page scores, and an order of pages."""
    return (group + 1) * pages


@njit(nogil=True, error_model="numpy")
def candidates(a, call, sequence, head, total):
    """(first, last) of the pages that scores decide about: those between the first page and the recent ones; where blocks are chosen,
    whole ones between the first block and what is recent. An index is of pages that change no more, and without one of bounds only
    quantised pages have them."""
    last, sealed = total - a[RECENT], np.int64(at(int32, at(int64, a[SEALED])[sequence])[call[LAYER] * call[KV_HEADS] + head])
    bounds = a[SCORE] == BOUND or a[SCORE] == HIERARCHY
    indexed = bounds or HIERARCHY <= a[SCORE] <= COLLISIONS
    if indexed and sealed > 1 or bounds and a[INDEX_WIDTH] < 2 * call[HEAD_DIM]:
        last = min(last, sealed)
    block = max(a[BLOCK], np.int64(1))
    last = max(np.int64(1), last // block * block)
    return min(block, last), last


@njit(nogil=True, error_model="numpy")
def wanted_pages(a, call, head, slots):
    """How many pages a head may read; a negative share: all."""
    share = at(float32, a[SHARES])[call[LAYER] * call[KV_HEADS] + head]
    if share < 0:
        return np.int64(1) << 40
    return np.int64(np.ceil(share * max(np.float32(a[BUDGET]), as_f32(a[FRACTION]) * np.float32(slots)) / np.float32(PAGE)))


@njit(nogil=True, error_model="numpy")
def list_row(a, call, sequence, head):
    return list_at(at(int64, call[SELECTIONS])[sequence], call[SELECTION_GROUP], call[KV_HEADS], call[SELECTION_CAPACITY], head)


@njit(nogil=True, error_model="numpy")
def queries_at(call, sequence, head):
    """Address of the rotated queries [group][head_dim] of a sequence's only row."""
    return call[ROTATED] + 4 * (rows_of(call, sequence)[0] * call[NUM_HEADS] + head * call[GROUP]) * call[HEAD_DIM]


@njit(nogil=True, error_model="numpy")
def scores_at(a, call, sequence, head):
    return a[PAGE_SCORES] + 4 * (sequence * call[KV_HEADS] + head) * call[MAX_PAGES]
