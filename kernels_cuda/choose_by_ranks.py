"""Lists of what a prompt reads, the best pages of each head by mean keys and queries: policies/prefill/dhsa.py has the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch

OWN = "density", "ends"
ARGS = (*prefill_call.ARGS, *OWN, "pages")
FOR_PROMPTS = True  # launched where some sequence has lists


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Mean keys. attributes["pages"]: of all sequences that have lists, at most."""
    return 4 * int(attributes["pages"]) * int(attributes["kv_heads"]) * int(attributes["head_dim"])


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    shared = 5 * prefill_call.pages_of(a, most)
    kernel = compile.function("choose_by_ranks", "choose_by_ranks", shared + prefill_call.STATIC)
    args = (*prefill_call.choice_args(a), np.int64(a["workspace"]), *(np.int64(a[name]) for name in OWN))
    return [prefill_call.write(a, most), prefill_call.mean_keys(a, most, a["workspace"]),
            Launch(kernel, prefill_call.blocks_grid(a, most), prefill_call.THREADS, args, shared, overlap=True)]
