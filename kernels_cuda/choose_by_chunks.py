"""Lists of what a prompt reads, by chunks of keys that are cut where these turn: policies/prefill/dhsa_chunks.py has the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE

OWN = "budget", "chunk", "turn"
ARGS = (*prefill_call.ARGS, *OWN, "pages")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
PAGE_CHUNKS = 4           # that a page may begin, at most (key_chunks.cuh)
PLACES = 512              # that a block settles (cut_keys.cu)
ARRAYS = "turns", "states", "taken", "weights", "starts", "counts", "keys", "means", "queries", "scores"  # the first of CHUNK_ARGS


def offsets(about: dict, max_pages: int, tokens: int) -> list[int]:
    """Where each of ARRAYS lies, and where the last one ends. about["pages"]: of all sequences that have lists, at most."""
    kv_heads, head_dim, pages = (int(about[name]) for name in ("kv_heads", "head_dim", "pages"))
    places, chunks = prefill_call.most_blocks(tokens), 4 * kv_heads * pages * PAGE_CHUNKS
    sizes = (4 * kv_heads * pages * PAGE, kv_heads * pages * PAGE, chunks, chunks, chunks, 4 * kv_heads * places, chunks * head_dim,
             4 * kv_heads * pages * head_dim, 4 * kv_heads * places * head_dim, 4 * kv_heads * places * max_pages * PAGE_CHUNKS)
    return [0, *np.cumsum([-(-size // 256) * 256 for size in sizes]).tolist()]


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of a page list too, at most."""
    return offsets(attributes, int(attributes["pages"]), rows)[-1]


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    (blocks, kv_heads, sequences), pages, rows = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most), most[a["q.rows"]]
    *arrays, _ = (a["workspace"] + x for x in offsets(a, a["cache.max_pages"], rows))
    own = *arrays, prefill_call.most_blocks(rows), a["pages"], *(a[name] for name in OWN), 0
    args = *prefill_call.choice_args(a), *(np.int64(x) for x in own)

    def cut(name, count, threads):
        return Launch(compile.function("cut_keys", name), (count, kv_heads, sequences), threads, args, overlap=True)

    def choose(name, count, threads, shared=0):
        kernel = compile.function("choose_by_chunks", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, (count, kv_heads, sequences), threads, args, shared, overlap=True)
    chunks = min(pages * PAGE_CHUNKS, pages * PAGE // a["chunk"] + 1)
    return [prefill_call.write(a, most), prefill_call.mean_keys(a, most, arrays[ARRAYS.index("means")]), cut("compare_sides", pages, 128),
            cut("settle_cuts", -(-pages * PAGE // PLACES), prefill_call.THREADS), cut("number_chunks", 1, prefill_call.THREADS),
            choose("chunk_keys", chunks, 128), choose("sum_queries", blocks, 128),
            choose("choose_by_chunks", blocks, prefill_call.THREADS, 5 * pages)]
