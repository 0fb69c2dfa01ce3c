"""Lists of what a prompt reads, by antidiagonals of strides: policies/prefill/xattention.py has the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.cached_attention import takes_fragments
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE

ARGS = (*prefill_call.ARGS, "stride", "tau", "cache.kinds")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
STRIDES = 8, 16, 32
HEAD_DIMS, FRAGMENTS = (64, 128), True  # what tensor cores take; whether they read pages as they are
ROWS, COLUMNS, SLICES = 128, 64, 16


def _parts(heads: int, head_dim: int, places: int, pages: int, stride: int) -> list[int]:
    """Bytes of arranged queries, edges, sums and tops."""
    rows = heads * places * prefill_call.QUERIES // stride
    sizes = 2 * heads * places * head_dim * prefill_call.QUERIES, 8 * rows, 2 * rows * pages, 4 * rows * -(-pages // stride)
    return [-(-size // 256) * 256 for size in sizes]


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    heads, head_dim, pages, stride = (int(attributes[name]) for name in ("num_heads", "head_dim", "pages", "stride"))
    return sum(_parts(heads, head_dim, prefill_call.most_blocks(rows), pages, stride))


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    if a["head_dim"] not in HEAD_DIMS or a["stride"] not in STRIDES or not takes_fragments(a["cache.kinds"], a["cache.keys_rotated"]):
        raise ValueError(f"CUDA kernels score strides of {', '.join(map(str, STRIDES))} tokens and heads of {HEAD_DIMS} channels, over "
                         "pages of halves and of codes by channel; choose another --sparse-prefill")
    (blocks, kv_heads, sequences), pages, stride = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most), a["stride"]
    places = prefill_call.most_blocks(most[a["q.rows"]])
    offsets = np.cumsum([0, *_parts(a["num_heads"], a["head_dim"], places, a["cache.max_pages"], stride)])[:4]
    common = (*prefill_call.choice_args(a), *(np.int64(a["workspace"] + x) for x in offsets), np.int64(places), np.int64(stride))
    tiles = -(-pages * PAGE // stride // COLUMNS), -(-blocks * a["num_heads"] // kv_heads * prefill_call.QUERIES // stride // ROWS)

    def launch(name, grid, threads, shared=0, last=0):
        kernel = compile.function("choose_by_antidiagonals", name, shared + (prefill_call.STATIC if name.startswith("choose") else 0))
        return Launch(kernel, grid, threads, (*common, np.int64(last)), shared, overlap=True)
    each = blocks, a["num_heads"], sequences
    return [prefill_call.write(a, most), launch("arrange_queries", each, 256), launch("edge_scores", each, 128),
            launch("score_strides", (*tiles, kv_heads * sequences), 256, 2 * 16 * SLICES * (ROWS + COLUMNS)),
            launch("choose_by_antidiagonals", (blocks, kv_heads, sequences), prefill_call.THREADS, 5 * pages, a["tau"])]
