"""What a decode step reads of each KV head, when that is not everything: lists of logical pages, kept with the sequence.

selection  [groups, kv_heads, HEADER + capacity] int32. A layer reads the lists of one group; several layers may share a group. A row is
    COUNT     pages in the list, ascending, which follow the header; ALL: the head reads every page
    SLOTS     tokens the head held when the list was made, 0 before the first
    AGE       steps since then
    INTERVAL  steps after which it is made again
"""
from numba import int32, int64, njit

from edgeattn.kernels_cpu.attention_call import KV_HEADS, SELECTION_CAPACITY, SELECTION_GROUP, SELECTIONS
from edgeattn.kernels_cpu.simd import at

COUNT, SLOTS, AGE, INTERVAL, HEADER = range(5)
ALL = -1
SPARSE, DENSE, READ, HELD, REUSED, STATS_FIELDS = range(6)  # counted for a layer: (sequence, head) pairs, pages


@njit(nogil=True, error_model="numpy")
def list_at(selection, group, kv_heads, capacity, head):
    """Address of one head's row, from that of the sequence's selection."""
    return selection + 4 * (group * kv_heads + head) * (HEADER + capacity)


@njit(nogil=True, error_model="numpy")
def list_of(call, sequence, head):
    """Address of the list that this layer reads; 0 where it reads everything."""
    if call[SELECTION_GROUP] < 0:
        return 0
    selection = at(int64, call[SELECTIONS])[sequence]
    if selection == 0:
        return 0
    row = list_at(selection, call[SELECTION_GROUP], call[KV_HEADS], call[SELECTION_CAPACITY], head)
    return 0 if at(int32, row)[COUNT] == ALL else row
