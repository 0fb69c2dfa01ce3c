"""Lists of what a prompt reads, by how mean heads weigh pages: policies/prefill/proxy_attn.py has the reference. Weights of a head's own
last queries are those of choose_by_samples."""
import numpy as np

from edgeattn.kernels_cuda import choose_by_samples, compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE

ARGS = (*prefill_call.ARGS, "proxies", "stride", "part", "budget", "pages", "cache.kinds")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
HEAD_DIMS, FRAGMENTS = choose_by_samples.HEAD_DIMS, choose_by_samples.FRAGMENTS
TILE = 64                 # keys


def _sampled(about: dict) -> dict:
    """What choose_by_samples weighs, and what it would choose by."""
    apart = int(about["stride"])
    return {"sampled": prefill_call.QUERIES // apart, "apart": apart, "segment": 0} | dict.fromkeys(
        ("part_down", "part_across", "fewest", "below"), 0)


def _sizes(about: dict, max_pages: int, tokens: int) -> list[int]:
    """Bytes of each array, in the order of PROXY_ARGS up to counts."""
    heads, kv_heads, head_dim, pages, stride = (int(about[name]) for name in ("num_heads", "kv_heads", "head_dim", "pages", "stride"))
    rows = kv_heads * prefill_call.most_blocks(tokens) * (prefill_call.QUERIES // stride)
    sizes = (2 * rows * head_dim, 2 * kv_heads * pages * (PAGE // stride) * head_dim, 4 * rows * max_pages,
             8 * rows * _tiles(max_pages, stride), 4 * rows, 4 * heads * prefill_call.SEQUENCES)
    return [-(-size // 256) * 256 for size in sizes]


def _tiles(pages: int, stride: int) -> int:
    return -(-pages * PAGE // stride // TILE)


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of all sequences that have lists, and of a page list, at most."""
    own = sum(_sizes(attributes, int(attributes["pages"]), rows))
    return own + choose_by_samples.workspace_bytes(tensors, attributes | _sampled(attributes), rows, threads)


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    (blocks, kv_heads, sequences), pages, heads = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most), a["num_heads"]
    tokens, stride, common = most[a["q.rows"]], a["stride"], prefill_call.choice_args(a)
    sizes = _sizes(a, a["cache.max_pages"], tokens)
    *weighed, _, _ = choose_by_samples.launches(a | _sampled(a) | {"workspace": a["workspace"] + sum(sizes)}, most)  # up to sums by page
    page_sums = weighed[-1].args[len(common) + 3]  # in SAMPLE_ARGS
    starts = a["workspace"] + np.cumsum([0, *sizes[:-1]])
    own = (*starts, page_sums, prefill_call.most_blocks(tokens), a["pages"], _tiles(a["cache.max_pages"], stride), a["proxies"], stride,
           a["part"], a["budget"], 0)

    def launch(name, grid, threads, shared=0):
        kernel = compile.function("choose_by_proxies", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, grid, threads, (*common, *(np.int64(x) for x in own)), shared, overlap=True)
    return [*weighed, launch("count_pages", (heads, sequences, 1), prefill_call.THREADS),
            launch("mean_queries", (blocks, kv_heads, sequences), 128), launch("mean_heads", (pages, kv_heads, sequences), 128),
            launch(f"score_proxies_{a['head_dim']}", (_tiles(pages, stride), kv_heads, sequences), 128),
            launch("proxy_totals", (-(-tokens // stride // 8), kv_heads, sequences), 256),
            launch("choose_by_proxies", (blocks, kv_heads, sequences), prefill_call.THREADS, 5 * pages)]
