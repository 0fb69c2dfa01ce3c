"""Decode that reads keys or values of pages in part (attention_in_part.cu), in place of cached_attention's kernels."""
import numpy as np

from edgeattn.kernels_cuda import compile
from edgeattn.kernels_cuda.attention_call import HEADS, call_args, ranges_of
from edgeattn.kernels_cuda.steps import Launch

IN_PART = "selection.thresholds", "batch.value_sums", "cache.progressive", "batch.confidence"
SHARED, THREADS = 25088, 256
CHUNK, FEWEST = 16, 4  # pages of a range, at least: with thresholds, where it has one of each head whose values are read; without


def asked(a: dict[str, int], most: dict) -> bool:
    """Whether a bucket's decode steps want it."""
    return bool(a["cache.progressive"] or a["selection.thresholds"] and most.get("sparse"))


def launch(a: dict[str, int], sequences: int, slots: int) -> Launch:
    if a["num_heads"] > HEADS * a["kv_heads"]:
        raise ValueError(f"CUDA kernels read pages in part for {HEADS} query heads a KV head at most; run with --device cpu")
    ranges, least = ranges_of(sequences * a["kv_heads"], slots), CHUNK if a["selection.thresholds"] else FEWEST
    args = (*call_args(a), *(np.int64(a[name]) for name in IN_PART), np.int64(ranges), np.int64(least))
    kernel = compile.function("attention_in_part", "attend_in_part", SHARED)
    return Launch(kernel, (ranges, a["kv_heads"], sequences), THREADS, args, SHARED, overlap=True)
