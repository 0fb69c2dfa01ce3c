"""Lists of what a prompt reads, by estimates of all scores: policies/prefill/sale.py has the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE

ARGS = (*prefill_call.ARGS, "pages", "prefill.sale_thresholds", "threshold")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
HEAD_DIMS, FRAGMENTS = (64, 128), False  # what the scan takes; pages of any kind, which are rounded first
BESIDE = 4                # heads of a block of the scan


def _parts(heads: int, kv_heads: int, head_dim: int, places: int, page_places: int, max_pages: int, sequences: int) -> list[int]:
    """Bytes of mean keys, keys and their steps, queries and theirs, and of what was found."""
    keys, queries = page_places * kv_heads * PAGE, heads * places * prefill_call.QUERIES
    sizes = 4 * sequences * kv_heads * head_dim, keys * head_dim, 4 * keys, queries * head_dim, 4 * queries, kv_heads * places * max_pages
    return [-(-size // 256) * 256 for size in sizes]


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of all sequences that have lists, and of a page list, at most."""
    heads, kv_heads, head_dim, pages = (int(attributes[name]) for name in ("num_heads", "kv_heads", "head_dim", "pages"))
    return sum(_parts(heads, kv_heads, head_dim, prefill_call.most_blocks(rows), pages, pages,
                      prefill_call.SEQUENCES))


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    if a["head_dim"] not in HEAD_DIMS or a["cache.keys_rotated"]:
        raise ValueError(f"CUDA kernels scan heads of {' or '.join(map(str, HEAD_DIMS))} channels, got {a['head_dim']}, and keys that "
                         "are not rotated; choose another --sparse-prefill")
    (blocks, kv_heads, sequences), pages = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most)
    places, heads = prefill_call.most_blocks(most[a["q.rows"]]), a["num_heads"]
    sizes = _parts(heads, kv_heads, a["head_dim"], places, a["pages"], a["cache.max_pages"], sequences)
    starts = a["workspace"] + np.cumsum([0, *sizes])[:-1]
    args = (*prefill_call.choice_args(a), *(np.int64(x) for x in (*starts, places, a["prefill.sale_thresholds"], a["threshold"], 0)))

    def launch(name, grid, threads, shared=0):
        kernel = compile.function("choose_by_excess", name, shared + (prefill_call.STATIC if shared else 0))
        return Launch(kernel, grid, threads, args, shared, overlap=True)
    fours = kv_heads * -(-(heads // kv_heads) // BESIDE)
    return [prefill_call.write(a, most), launch("mean_of_keys", (kv_heads, sequences, 1), 128),
            launch("round_keys", (pages, kv_heads, sequences), 256), launch("round_queries", (blocks, heads, sequences), 256),
            launch(f"scan_scores_{a['head_dim']}", (blocks, fours, sequences), 256),
            launch("choose_by_excess", (blocks, kv_heads, sequences), prefill_call.THREADS, pages)]
