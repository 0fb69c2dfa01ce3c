"""Lists of what a prompt reads, by lines through the weights of its last queries: policies/prefill/minference.py has the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.cached_attention import takes_fragments
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE

OWN = "sampled", "prefill.patterns", "n_v", "n_s"
ARGS = (*prefill_call.ARGS, *OWN, "pages", "cache.kinds")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
HEAD_DIMS, FRAGMENTS = (64, 128), True  # what tensor cores take; whether they read pages as they are
SAMPLED, TILE = 64, 64    # rows at most; keys of a block


def offsets(heads: int, kv_heads: int, head_dim: int, places: int, pages: int) -> list[int]:
    """Where queries, partial results and what comes after them in their place, totals, the two kinds of lines and mean keys lie, and where
    they end."""
    of_rows, slots, lines = heads * places * SAMPLED, 4 * heads * pages * PAGE, 4 * kv_heads * pages
    sizes = 2 * of_rows * head_dim, max(8 * heads * pages * SAMPLED, 3 * slots), 4 * of_rows, lines, lines, 4 * kv_heads * pages * head_dim
    return [0, *np.cumsum([-(-size // 256) * 256 for size in sizes]).tolist()]


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of all sequences that have lists, and of a page list, at most."""
    sizes = (int(attributes[name]) for name in ("num_heads", "kv_heads", "head_dim"))
    return offsets(*sizes, prefill_call.most_lists(rows), int(attributes["pages"]))[-1]


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    if a["head_dim"] not in HEAD_DIMS or not takes_fragments(a["cache.kinds"], a["cache.keys_rotated"]):
        raise ValueError(f"CUDA kernels look for lines with heads of {HEAD_DIMS} channels, over pages of halves and of codes by channel; "
                         "choose another --sparse-prefill")
    (blocks, kv_heads, sequences), pages, heads = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most), a["num_heads"]
    places = prefill_call.most_lists(most[a["q.rows"]])
    queries, partials, totals, verticals, slashes, means, _ = (
        a["workspace"] + x for x in offsets(heads, kv_heads, a["head_dim"], places, a["pages"]))
    by_key, near, far = (partials + 4 * heads * a["pages"] * PAGE * i for i in range(3))
    args = (*prefill_call.choice_args(a), *(np.int64(x) for x in (
        queries, partials, totals, by_key, near, far, verticals, slashes, means, places, a["pages"], *(a[name] for name in OWN), 0)))

    def launch(name, grid, threads, shared=0):
        kernel = compile.function("choose_by_lines", name, shared + (prefill_call.STATIC if shared else 0))
        return Launch(kernel, grid, threads, args, shared, overlap=True)
    tiles = -(-pages * PAGE // TILE), kv_heads, sequences
    calibrated = a["prefill.patterns"] != 0  # then some heads may go by means
    return [prefill_call.write(a, most), *([prefill_call.mean_keys(a, most, means)] if calibrated else []),
            launch("arrange_sampled", (heads, sequences, 1), 256), launch(f"line_tops_{a['head_dim']}", tiles, 128),
            launch("line_totals", (SAMPLED // 8, heads, sequences), 256), launch(f"line_sums_{a['head_dim']}", tiles, 128),
            launch("pick_lines", (2, heads, sequences), prefill_call.THREADS),
            launch("choose_by_lines", (blocks, kv_heads, sequences), prefill_call.THREADS, (5 if calibrated else 1) * pages)]
