"""Plans of prefill as the kernels read them (kernels_cpu/attention_prefill_int8.py)."""
import numpy as np

from edgeattn.prefill_plan import PrefillPlan


def write_lists(plan: PrefillPlan) -> np.ndarray:
    """int32: for each KV head and query block where its pages begin, where its single keys do, and last where these end; then all of them,
    ascending. The plan is one of KV heads (PrefillPlan.union)."""
    heads, blocks, _ = plan.blocks.shape
    pages = plan.blocks.reshape(heads * blocks, -1)
    columns = np.zeros((heads * blocks, 0), bool) if plan.columns is None else plan.columns.reshape(heads * blocks, -1)
    sizes = np.stack([pages.sum(1), columns.sum(1)], 1).ravel()
    starts = np.concatenate([[0], np.cumsum(sizes)]) + 2 * heads * blocks + 1
    found = np.empty(int(starts[-1]), np.int32)
    found[:len(starts)] = starts
    for numbers, first in ((pages, starts[:-1:2]), (columns, starts[1::2])):
        row, number = np.nonzero(numbers)
        within = np.arange(len(row)) - np.concatenate([[0], np.cumsum(numbers.sum(1))])[row]
        found[first[row] + within] = number
    return found
