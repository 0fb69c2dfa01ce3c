"""Lists of what a prompt reads, found by halving ranges of pages: policies/prefill/hip.py has the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE

OWN = "keep", "beam", "stride", "step"
ARGS = (*prefill_call.ARGS, *OWN, "pages")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
ROTATED = False           # keys that it reads: queries become halves before any other rotation
MIDDLES, TILE = 2, 16     # keys of a page that stand for ranges; queries of a tile


def _width(head_dim: int) -> int:
    return -(-head_dim // 32) * 32


def _sizes(about: dict, max_pages: int, tokens: int) -> tuple[int, int]:
    """Bytes of keys, and of maps of pages."""
    kv_heads, head_dim, pages, step = (int(about[name]) for name in ("kv_heads", "head_dim", "pages", "step"))
    of_page = MIDDLES + len(range(step // 2, PAGE, step))
    sizes = 2 * pages * kv_heads * of_page * _width(head_dim), 4 * kv_heads * prefill_call.most_blocks(tokens) * -(-max_pages // 32)
    return tuple(-(-size // 256) * 256 for size in sizes)


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of all sequences that have lists, and of a page list, at most."""
    return sum(_sizes(attributes, int(attributes["pages"]), rows))


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    (blocks, kv_heads, sequences), pages = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most)
    keys, _ = _sizes(a, a["cache.max_pages"], most[a["q.rows"]])
    ranges, rows = min(2 * a["beam"], pages), -(-prefill_call.QUERIES // a["stride"])
    own = (a["workspace"], a["workspace"] + keys, prefill_call.most_blocks(most[a["q.rows"]]), ranges, *(a[name] for name in OWN), 0)
    args = (*prefill_call.choice_args(a), *(np.int64(x) for x in own))

    def launch(name, grid, threads, shared=0):
        kernel = compile.function("choose_by_search", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, grid, threads, args, shared, overlap=True)
    queries = 2 * -(-rows // TILE) * TILE * (_width(a["head_dim"]) + 8)
    return [prefill_call.write(a, most), launch("copy_keys", (pages, kv_heads, sequences), 128),
            launch("search_pages", (blocks, a["num_heads"], sequences), prefill_call.THREADS, queries + 9 * ranges),
            launch("choose_by_search", (blocks, kv_heads, sequences), prefill_call.THREADS, pages)]
