"""From scores to lists: each KV head's best pages, or those of all heads of a layer together, and lists that serve more than one step."""
import numpy as np
from numba import float32, int32, int64, njit

from edgeattn.kernels_cpu.attention_call import KV_HEADS, LAYER, SCRATCH, SCRATCH_SIZE, SELECTION_CAPACITY, slots_of
from edgeattn.kernels_cpu.selection_call import BEST, BLOCK, COMBINE, REUSE, STATS, candidates, list_row, scores_at, wanted_pages
from edgeattn.kernels_cpu.selections import AGE, ALL, COUNT, DENSE, HEADER, HELD, INTERVAL, READ, REUSED, SLOTS, SPARSE, STATS_FIELDS
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import as_f32
from edgeattn.kernels_cpu.top_pages import top_pages
from edgeattn.page_formats import PAGE

LONGEST = 16  # steps that a list serves at most


@njit(nogil=True, error_model="numpy")
def _possible(a, call, sequence, head, first, last):
    """Pages that a score of -infinity does not exclude."""
    count, scores = np.int64(0), at(float32, scores_at(a, call, sequence, head))
    for page in range(first, last):
        count += scores[page] > -np.inf
    return count


@njit(nogil=True, error_model="numpy")
def _overlap(pages, count, old, old_count):
    """The part of one ascending list that is in another."""
    both, j = 0, 0
    for i in range(count):
        while j < old_count and old[j] < pages[i]:
            j += 1
        both += j < old_count and old[j] == pages[i]
    return np.float32(both) / np.float32(max(count, 1))


@njit(nogil=True, error_model="numpy")
def choose(a, call, sequence, head, wanted, slots, total, thread):
    """Make the list anew."""
    row, (first, last) = at(int32, list_row(a, call, sequence, head)), candidates(a, call, sequence, head, total)
    free = max(wanted - (total - last) - first, np.int64(0)) // max(a[BLOCK], np.int64(1)) * max(a[BLOCK], np.int64(1))
    follows = row[COUNT] >= 0 and row[SLOTS] + row[AGE] + 1 == slots
    row[AGE] = 0
    if wanted >= total or free >= last - first or total - last + first + free > call[SELECTION_CAPACITY] - 2:
        row[COUNT], row[SLOTS], row[INTERVAL] = ALL, slots, 1
        return
    old, old_count = at(int32, call[SCRATCH] + 4 * thread * call[SCRATCH_SIZE]), np.int64(row[COUNT])
    if as_f32(a[REUSE]) > 0 and follows:
        for i in range(old_count):
            old[i] = row[HEADER + i]
    for page in range(first):
        row[HEADER + page] = page
    free = min(free, _possible(a, call, sequence, head, first, last))
    if free:
        top_pages(scores_at(a, call, sequence, head), first, last, free, row, HEADER + first)
    for page in range(last, total):
        row[HEADER + first + free + page - last] = page
    row[COUNT], row[SLOTS] = first + free + total - last, slots
    interval = np.int64(1)
    if as_f32(a[REUSE]) > 0 and follows:
        kept = _overlap(at(int32, list_row(a, call, sequence, head) + 4 * (HEADER + first)), free, old, old_count)
        interval = min(2 * np.int64(row[INTERVAL]), LONGEST) if kept >= as_f32(a[REUSE]) else max(np.int64(row[INTERVAL]) // 2, np.int64(1))
    row[INTERVAL] = interval


@njit(nogil=True, error_model="numpy")
def still_good(a, call, sequence, head, slots):
    """Whether a list made some steps ago serves this step too."""
    row = at(int32, list_row(a, call, sequence, head))
    return row[COUNT] >= 1 and row[SLOTS] + row[AGE] + 1 == slots and row[AGE] + 1 < row[INTERVAL]


@njit(nogil=True, error_model="numpy")
def use_again(a, call, sequence, head, total):
    """A list that is still good gets the page begun since."""
    row = at(int32, list_row(a, call, sequence, head))
    row[AGE] += 1
    if row[HEADER + row[COUNT] - 1] < total - 1:
        row[HEADER + row[COUNT]] = total - 1
        row[COUNT] += 1


@njit(nogil=True, error_model="numpy")
def _all_still_good(a, call, sequence):
    good = True
    for head in range(call[KV_HEADS]):
        good = good and still_good(a, call, sequence, head, slots_of(call, sequence, head))
    return good


@njit(nogil=True, error_model="numpy")
def choosing_together(a, call, sequence):
    """Whether heads that choose together need scores: their lists are made anew, and some head reads only a part."""
    some = False
    for head in range(call[KV_HEADS]):
        slots = slots_of(call, sequence, head)
        some = some or wanted_pages(a, call, head, slots) < (slots + PAGE - 1) // PAGE
    return some and not _all_still_good(a, call, sequence)


@njit(nogil=True, error_model="numpy")
def choose_together(a, call, sequence):
    """All KV heads of the layer choose by the sum of their scores, or by the best of them."""
    slots = slots_of(call, sequence, 0)
    total = (slots + PAGE - 1) // PAGE
    if _all_still_good(a, call, sequence):
        for head in range(call[KV_HEADS]):
            use_again(a, call, sequence, head, total)
        return
    for head in range(1, call[KV_HEADS]):
        sums, scores = at(float32, scores_at(a, call, sequence, 0)), at(float32, scores_at(a, call, sequence, head))
        for page in range(total):
            sums[page] = max(sums[page], scores[page]) if a[COMBINE] == BEST else sums[page] + scores[page]
    for head in range(call[KV_HEADS]):
        if head:
            sums, scores = at(float32, scores_at(a, call, sequence, 0)), at(float32, scores_at(a, call, sequence, head))
            for page in range(total):
                scores[page] = sums[page]
        choose(a, call, sequence, head, wanted_pages(a, call, head, slots), slots, total, 0)


@njit(nogil=True, error_model="numpy")
def count_reads(a, call, sequence):
    """Add what this step reads to the layer's figures."""
    stats = at(int64, a[STATS] + 8 * STATS_FIELDS * call[LAYER])
    for head in range(call[KV_HEADS]):
        row, total = at(int32, list_row(a, call, sequence, head)), (slots_of(call, sequence, head) + PAGE - 1) // PAGE
        dense = row[COUNT] == ALL
        stats[DENSE if dense else SPARSE] += 1
        stats[READ] += total if dense else np.int64(row[COUNT])
        stats[HELD] += total
        stats[REUSED] += row[AGE] > 0
