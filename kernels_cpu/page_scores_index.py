"""Page scores that read the index alone, or first of all (page_index.py says what is in it).

    bound            as page_scores.py has it, where pages do not know the range of their keys
    hierarchy        bounds of the pages in the `blocks` blocks whose mean keys score highest, the first and the last block among them;
                     other pages are left out (HISA, arXiv 2603.28458)
    representatives  of a whole block: its representative's product with the sum of the group's queries (InfLLM, arXiv 2402.04617)
    landmarks        of a whole block: the landmark's key, by the group's best query (arXiv 2305.16300)
    components       the page's best token by the first principal components, for the sum of the group's queries (Loki, arXiv 2406.02542)
    collisions       in how many tables tokens' signatures are a query's, over tokens and queries that share two at least; a page with none
                     is left out (MagicPIG, arXiv 2410.16179)
A page that is left out scores -infinity.
"""
import numpy as np
from numba import float32, int32, int64, njit, uint8, uint16

from edgeattn.kernels_cpu.attention_call import (CALL, GROUP, HEAD_DIM, KV_HEADS, LAYER, MAX_PAGES, PAGE, SCRATCH, SCRATCH_SIZE, WORKSPACE,
                                                 entry_of)
from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_index import (BLOCK as OF_PAGES, CENTRE, COLLISIONS, COMPONENT_SCORES, HIERARCHY, REPRESENTATIVES, block_at,
                                             index_pages, sides)
from edgeattn.kernels_cpu.page_scores import bound_scores
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.selection_call import (BITS, BLOCK, BLOCKS, BOUND, COMPONENTS, INDEX, INDEX_WIDTH, INDEXED, REACH, SCORE,
                                                 queries_at, scores_at)
from edgeattn.kernels_cpu.simd import at, fma, hmax, hsum, load, load_half, splat, store, vmax
from edgeattn.kernels_cpu.steps import as_f32
from edgeattn.kernels_cpu.top_pages import top_pages

SHARED = 2  # tables


@njit(nogil=True, error_model="numpy")
def _product(q, at_q, halves, depth):
    total = splat(F, np.float32(0))
    for c in range(0, depth, 16):
        total = fma(load(F, q, at_q + c), load_half(F, halves, c), total)
    return hsum(total)


@njit(nogil=True, error_model="numpy")
def _best_product(q, group, halves, depth):
    best = np.float32(-np.inf)
    for h in range(group):
        best = max(best, _product(q, h * depth, halves, depth))
    return best


@njit(nogil=True, error_model="numpy")
def _sum_queries(q, group, depth, to):
    for c in range(0, depth, 16):
        total = load(F, q, c)
        for h in range(1, group):
            total += load(F, q, h * depth + c)
        store(to, c, total)


@njit(nogil=True, error_model="numpy")
def _keep_blocks(call, q, index, width, blocks, first, last, scores, address, scratch):
    """Score 0 for the pages of the blocks that stay, -infinity for others."""
    low, high = first // OF_PAGES, (last - 1) // OF_PAGES  # these two stay
    middle = high - low - 1
    for page in range(first, last):
        scores[page] = 0
    if middle <= blocks - 2:
        return
    for b in range(low + 1, high):
        scores[b] = _best_product(q, call[GROUP], at(uint16, block_at(call, HIERARCHY, index, width, OF_PAGES, b)), call[HEAD_DIM])
    chosen = at(int32, scratch)
    top_pages(address, low + 1, high, blocks - 2, chosen, 0)
    for page in range(first, last):
        scores[page] = 0 if page // OF_PAGES == low or page // OF_PAGES == high else -np.inf
    for i in range(blocks - 2):
        for page in range(chosen[i] * OF_PAGES, (chosen[i] + 1) * OF_PAGES):
            scores[page] = 0


@njit(nogil=True, error_model="numpy")
def _block_scores(call, kind, q, index, width, block, first, last, scores, summed):
    if kind == REPRESENTATIVES:
        _sum_queries(q, call[GROUP], call[HEAD_DIM], summed)
    for b in range(first // block, last // block):
        row = at(uint16, block_at(call, kind, index, width, block, b))
        score = _product(summed, 0, row, call[HEAD_DIM]) if kind == REPRESENTATIVES else _best_product(q, call[GROUP], row, call[HEAD_DIM])
        for page in range(b * block, (b + 1) * block):
            scores[page] = score


@njit(nogil=True, error_model="numpy")
def _component_scores(call, q, index, width, components, first, last, scores, summed):
    depth, rank = call[HEAD_DIM], width // PAGE
    _sum_queries(q, call[GROUP], depth, summed)
    for i in range(rank):
        total = splat(F, np.float32(0))
        for c in range(0, depth, 16):
            total = fma(load(F, summed, c), load(F, components, i * depth + c), total)
        summed[depth + i] = hsum(total)
    for page in range(first, last):
        row = at(uint16, index + 2 * page * width)
        a = b = splat(F, np.float32(0))
        for i in range(rank):
            weight = splat(F, summed[depth + i])
            a, b = fma(load_half(F, row, i * PAGE), weight, a), fma(load_half(F, row, i * PAGE + 16), weight, b)
        scores[page] = hmax(vmax(a, b))


@njit(nogil=True, error_model="numpy")
def _collision_scores(call, q, index, width, planes, bits, first, last, scores, codes):
    """codes: scratch for the queries' own, and for counts of a page's tokens."""
    tables, group = 2 * width // PAGE, call[GROUP]
    counts = group * tables
    for h in range(group):
        for table in range(tables):
            codes[h * tables + table] = sides(q, h * call[HEAD_DIM], planes, table, bits, call[HEAD_DIM])
    for page in range(first, last):
        row, total = at(uint8, index + 2 * page * width), np.int64(0)
        for h in range(group):
            for t in range(PAGE):
                codes[counts + t] = 0
            for table in range(tables):
                for t in range(PAGE):
                    codes[counts + t] += row[table * PAGE + t] == codes[h * tables + table]
            for t in range(PAGE):
                total += np.int64(codes[counts + t]) if codes[counts + t] >= SHARED else 0
        scores[page] = total if total and last >= CENTRE[1] else -np.inf


@njit(nogil=True, error_model="numpy")
def _vectors(a, call, head):
    """Address of the vectors that keys are multiplied with for this index; 0 where there are none. Principal components are each KV head's
    own."""
    own = call[LAYER] * call[KV_HEADS] + head if a[SCORE] == COMPONENT_SCORES else 0
    return a[COMPONENTS] + 4 * own * call[HEAD_DIM] * call[HEAD_DIM] if a[COMPONENTS] else np.int64(0)


@worker
def score(a, begin, last, task, thread):
    """Complete the index of one KV head of a sequence, which `task` is the number of, and score its pages."""
    call = at(int64, a[WORKSPACE] + CALL)
    sequence, head, depth, width = task // call[KV_HEADS], task % call[KV_HEADS], call[HEAD_DIM], a[INDEX_WIDTH]
    lane, kind, block, vectors = call[LAYER] * call[KV_HEADS] + head, a[SCORE], max(a[BLOCK], np.int64(1)), _vectors(a, call, head)
    index = at(int64, a[INDEX])[sequence] + 2 * lane * call[MAX_PAGES] * width
    index_pages(call, sequence, head, last, kind, index, width, block, a[BITS], vectors, at(int64, a[INDEXED])[sequence] + 4 * lane, thread)
    q_at, found = queries_at(call, sequence, head), scores_at(a, call, sequence, head)
    scratch = call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]
    q, scores = at(float32, q_at), at(float32, found)
    if kind == BOUND or kind == HIERARCHY:
        bounds = index if width >= 2 * depth else np.int64(0)
        first = begin
        if kind == HIERARCHY:
            _keep_blocks(call, q, index, width, a[BLOCKS], begin, last, scores, found, scratch)
            first = min(np.int64(OF_PAGES), last)  # bounds are made for four pages at once: for those of a block
            bound_scores(call, sequence, head, q_at, as_f32(a[REACH]), bounds, 2 * depth, begin, first, scores, thread, True)
        bound_scores(call, sequence, head, q_at, as_f32(a[REACH]), bounds, 2 * depth, first, last, scores, thread, kind == HIERARCHY)
    elif kind == COMPONENT_SCORES:
        _component_scores(call, q, index, width, at(float32, vectors), begin, last, scores, at(float32, scratch))
    elif kind == COLLISIONS:
        _collision_scores(call, q, index, width, at(float32, vectors), a[BITS], begin, last, scores, at(uint8, scratch))
    else:
        _block_scores(call, kind, q, index, width, block, begin, last, scores, at(float32, scratch))
    for page in range(begin, last):
        if entry_of(call, sequence, head, page) < 0:  # released
            scores[page] = -np.inf
