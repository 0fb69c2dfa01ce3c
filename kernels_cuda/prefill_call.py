"""What kernels that choose what a prompt reads have in common (prefill_choice.cuh): arguments, grids, shared and scratch memory."""
import numpy as np

from edgeattn.kernels_cuda import cached_attention, compile
from edgeattn.kernels_cuda.attention_call import CALL, HEADS, call_args
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE

CHOICE = "batch.chunks", "prefill.stats", "columns", "sink", "recent"  # in the order of CHOICE_ARGS
ARGS = (*CALL, *CHOICE)
BLOCK_PLACE, PAGE_PLACE, WHOLE, CHUNK_FIELDS = range(4)     # of a sequence in batch.chunks
QUERIES, FEWEST, THREADS = 64, 32, 256
SEQUENCES = 64      # of a call at most (runtime.py)
LIST_ROW = 4        # int32 of a list's row (attention_reads.cuh)
STATIC = 9 << 10    # bytes of shared memory that kernels have besides, at most
MOST_PAGES = 16384  # a weight and a mark each in shared memory


def most_lists(tokens: int) -> int:
    """Prompts with lists that a call of so many tokens may have, and one more: each has FEWEST tokens."""
    return min(SEQUENCES, tokens // FEWEST + 1)


def most_blocks(tokens: int) -> int:
    """Blocks of queries that they may have: of each prompt one is not full."""
    return min(tokens // QUERIES + SEQUENCES, tokens // FEWEST + 1)


def list_ints(kv_heads: int, max_pages: int, columns: int = 0) -> int:
    """int32 that the lists of one block of queries take. columns: single keys of each, at most."""
    return kv_heads * (LIST_ROW + max_pages + columns)


def choice_args(a: dict[str, int]) -> tuple:
    return (*call_args(a), *(np.int64(a[name]) for name in CHOICE))


def check(a: dict[str, int]) -> None:
    if a["num_heads"] // a["kv_heads"] > HEADS or a["cache.max_pages"] > MOST_PAGES:
        raise ValueError(f"CUDA kernels choose what a prompt reads for {HEADS} query heads a KV head and {MOST_PAGES * PAGE} tokens at "
                         "most; use --sparse-prefill off")


def write(a: dict[str, int], most: dict) -> Launch:
    """New keys and values into their pages, where those who choose find all keys; attention need not do it again."""
    return cached_attention.write(a, most[a["q.rows"]], cached_attention.MORE_ROWS)


def mean_keys(a: dict[str, int], most: dict, means: int) -> Launch:
    """means [pages of all sequences][kv_heads][head_dim] float32"""
    kernel = compile.function("choose_by_means", "mean_keys")
    grid = pages_of(a, most), a["kv_heads"], most[a["batch.sequences"]]
    return Launch(kernel, grid, 128, (*choice_args(a), np.int64(means)), overlap=True)


def blocks_grid(a: dict[str, int], most: dict) -> tuple[int, int, int]:
    return -(-most[a["q.rows"]] // QUERIES), a["kv_heads"], most[a["batch.sequences"]]


def pages_of(a: dict[str, int], most: dict) -> int:
    """That a sequence may have."""
    return min(a["cache.max_pages"], -(-most["slots"] // PAGE))
