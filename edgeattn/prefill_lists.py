"""Plans of prefill as the kernels read them (kernels_cpu/attention_prefill_int8.py)."""
import numpy as np

from edgeattn.kernels_cpu.attention_call import CORRECTION, DELTA, LIST_HEADER, MEANS, NONE, SKIP, TAIL
from edgeattn.prefill_plan import PrefillPlan

CORRECTIONS = {"none": NONE, "tail": TAIL, "delta": DELTA}


def write_lists(plans: list[PrefillPlan], correction: str = "none", means: np.ndarray | None = None, skip: float = 1e30) -> np.ndarray:
    """int32: a header (kernels_cpu/attention_call.py); for each KV head and query block where its pages begin, where its single keys do,
    and last where these end; then all of them, ascending. The plans are of KV heads (PrefillPlan.union), one after the other.

    correction  a function of prefill_corrections.py, or "none"; means: for "tail", [kv_heads, max_pages, head_dim + width] float32, kept by
                the caller while the list is used
    skip        pages whose largest weight is 2**-skip of a row's largest so far, or less, are left out of that row
    """
    pages = _join([plan.blocks for plan in plans])
    columns = _join([np.zeros((*plan.blocks.shape[:2], 0), bool) if plan.columns is None else plan.columns for plan in plans])
    sizes = np.stack([pages.sum(1), columns.sum(1)], 1).ravel()
    starts = np.concatenate([[0], np.cumsum(sizes)]) + LIST_HEADER + len(sizes) + 1
    found = np.empty(int(starts[-1]), np.int32)
    found[CORRECTION], found[SKIP:SKIP + 1].view(np.float32)[:] = CORRECTIONS[correction], skip
    found[MEANS:LIST_HEADER].view(np.int64)[:] = 0 if means is None else means.ctypes.data
    found[LIST_HEADER:LIST_HEADER + len(starts)] = starts
    for chosen, first in ((pages, starts[:-1:2]), (columns, starts[1::2])):
        row, number = np.nonzero(chosen)
        within = np.arange(len(row)) - np.concatenate([[0], np.cumsum(chosen.sum(1))])[row]
        found[first[row] + within] = number
    return found


def _join(parts) -> np.ndarray:
    """[heads, query blocks, places] each -> [all heads * query blocks, the most places]"""
    most = max(part.shape[2] for part in parts)
    parts = [np.pad(part, ((0, 0), (0, 0), (0, most - part.shape[2]))) for part in parts]
    return np.concatenate([part.reshape(part.shape[0] * part.shape[1], most) for part in parts])
