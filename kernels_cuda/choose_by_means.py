"""Lists of what a prompt reads, by mean keys of pages and mean queries: policies/prefill/auto.py has the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch

OWN = "part", "least", "budget", "fraction"  # least, budget: pages
ARGS = (*prefill_call.ARGS, *OWN, "pages")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"


def _means_bytes(pages: int, kv_heads: int, head_dim: int) -> int:
    return -(-4 * pages * kv_heads * head_dim // 256) * 256


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Mean keys, and each query head's scores. attributes["pages"]: of all sequences that have lists, and of a page list, at most."""
    heads, kv_heads, head_dim, pages = (int(attributes[name]) for name in ("num_heads", "kv_heads", "head_dim", "pages"))
    return _means_bytes(pages, kv_heads, head_dim) + 4 * heads * prefill_call.most_blocks(rows) * pages


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    (blocks, kv_heads, sequences), pages = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most)
    common = prefill_call.choice_args(a)
    means = np.int64(a["workspace"])
    scores = means + _means_bytes(a["pages"], kv_heads, a["head_dim"])
    places, shared = np.int64(prefill_call.most_blocks(most[a["q.rows"]])), 5 * pages
    own = (np.int64(a[name]) for name in OWN)
    choose = compile.function("choose_by_means", "choose_by_means", shared + prefill_call.STATIC)
    return [prefill_call.write(a, most), prefill_call.mean_keys(a, most, means),
            Launch(choose, (blocks, kv_heads, sequences), prefill_call.THREADS, (*common, means, scores, places, *own), shared,
                   overlap=True)]
