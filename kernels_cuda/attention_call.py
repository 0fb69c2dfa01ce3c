"""Arguments of the kernels of attention and selection (attention_call.cuh), and how their grids are cut."""
from functools import cache

import numpy as np

from edgeattn.kernels_cuda import device

# In the order of CALL_ARGS, then what only the host looks at.
CALL = ("q", "q.stride", "k", "k.stride", "v", "v.stride", "cos", "cos.stride", "sin", "out", "out.stride", "num_heads", "kv_heads",
        "head_dim", "rotary_dim", "interleaved", "scale", "window", "layer", "batch.positions", "batch.row_starts", "batch.page_tables",
        "batch.slot_counts", "batch.compensation", "cache.pools", "cache.max_pages", "cache.keys_rotated", "batch.prefill_lists",
        "batch.selections", "selection.group", "selection.capacity", "workspace", "q.rows", "batch.sequences", "state")
HEADS = 8            # query heads of a group that a block takes
MOST_RANGES = 128    # that the pages of a KV head are cut into; the newest token is one more
MOST_PLACES = 1 << 16  # sequences or rows times KV heads, at most (attention_merge.cuh)
BLOCKS = 2           # that a processor holds at once


def call_args(a: dict[str, int]) -> tuple:
    return tuple(np.int64(a[name]) for name in CALL)


@cache
def attribute(name: str) -> int:
    """Of the device, by CuPy's name for it."""
    return device.cupy().cuda.Device().attributes[name]


def processors() -> int:
    return attribute("MultiProcessorCount")


def ranges_of(places: int, slots: int) -> int:
    """How many ranges keep all processors busy, with `places` (sequence or row, KV head) and at most `slots` tokens each."""
    many = BLOCKS * processors() // places - 1
    return max(1, min(MOST_RANGES, many - (many == 32), -(-slots // 32)))  # 31 and the newest token's: a lane each where they are merged


def partial_bytes(rows: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Scratch for partial results, whatever the bucket."""
    return 4 * (2 * rows * kv_heads + BLOCKS * processors()) * (heads // kv_heads) * (head_dim + 4)
