"""Lists of what a prompt reads, by the weight of lines that cross pages: policies/prefill/dhsa.py, mode vs, has the reference. The weights
are those of choose_by_lines."""
import numpy as np

from edgeattn.kernels_cuda import choose_by_lines, compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch

ARGS = (*prefill_call.ARGS, "density", "sampled", "pages", "cache.kinds")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
HEAD_DIMS, FRAGMENTS = (64, 128), True  # what tensor cores take; whether they read pages as they are
LINES = {"prefill.patterns": 0, "n_v": 0, "n_s": 0}  # what choose_by_lines picks by, and here nobody


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    return choose_by_lines.workspace_bytes(tensors, attributes, rows, threads)


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    (blocks, kv_heads, sequences), pages, heads = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most), a["num_heads"]
    *weighed, _, _ = choose_by_lines.launches(a | LINES, most)  # up to sums by key and distance, of which it would pick
    common = prefill_call.choice_args(a)
    _, _, _, by_key, near, far, _, _, means, _, page_places = weighed[-1].args[len(common):][:11]  # LINE_ARGS
    args = (*common, by_key, near, far, means, page_places, np.int64(a["density"]))  # sums of pages lie where means would

    def launch(name, grid, shared=0):
        kernel = compile.function("choose_by_crossings", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, grid, prefill_call.THREADS, args, shared, overlap=True)
    return [*weighed, launch("pick_crossings", (2, heads, sequences)),
            launch("choose_by_crossings", (blocks, kv_heads, sequences), 5 * pages)]
