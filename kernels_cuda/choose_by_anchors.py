"""Lists of what a prompt reads, by how near scores come to an anchor: policies/prefill/anchor.py has the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.cached_attention import takes_fragments
from edgeattn.kernels_cuda.steps import Launch

OWN = "step", "theta"
ARGS = (*prefill_call.ARGS, *OWN, "cache.kinds")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
HEAD_DIMS, FRAGMENTS = (64, 128), True  # what tensor cores take; whether they read pages as they are
TILE = 16                 # rows


def _sizes(about: dict, max_pages: int, tokens: int) -> dict[str, int]:
    """Bytes of each array, in the order of ANCHOR_ARGS, then superblocks, of which each prompt has one that is not full, and tiles."""
    heads, kv_heads, head_dim, step = (int(about[name]) for name in ("num_heads", "kv_heads", "head_dim", "step"))
    blocks = prefill_call.most_blocks(tokens)
    superblocks = min(blocks, blocks // step + prefill_call.most_lists(tokens))
    tiles = -(-heads // kv_heads * min(step, blocks) // TILE)
    rows = kv_heads * superblocks * tiles * TILE
    found = {"limits": 4 * rows, "means": 2 * rows * head_dim, "words": 4 * kv_heads * superblocks * max_pages}
    return {name: -(-size // 256) * 256 for name, size in found.items()} | {"superblocks": superblocks, "tiles": tiles}


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of a page list, at most."""
    *sizes, _, _ = _sizes(attributes, int(attributes["pages"]), rows).values()
    return sum(sizes)


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    if a["head_dim"] not in HEAD_DIMS or not takes_fragments(a["cache.kinds"], a["cache.keys_rotated"]):
        raise ValueError(f"CUDA kernels look for anchors with heads of {HEAD_DIMS} channels, over pages of halves and of codes by channel; "
                         "choose another --sparse-prefill")
    (blocks, kv_heads, sequences), pages = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most)
    *sizes, superblocks, tiles = _sizes(a, a["cache.max_pages"], most[a["q.rows"]]).values()
    starts = a["workspace"] + np.cumsum([0, *sizes[:-1]])
    args = (*prefill_call.choice_args(a), *(np.int64(x) for x in (*starts, superblocks, tiles, *(a[name] for name in OWN), 0)))

    def launch(name, grid, threads, shared=0):
        kernel = compile.function("choose_by_anchors", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, grid, threads, args, shared, overlap=True)
    return [prefill_call.write(a, most), launch(f"anchor_blocks_{a['head_dim']}", (blocks, a["num_heads"], sequences), 128),
            launch(f"near_keys_{a['head_dim']}", (-(-pages // 2), kv_heads, sequences), 128),
            launch("choose_by_anchors", (blocks, kv_heads, sequences), prefill_call.THREADS, pages)]
