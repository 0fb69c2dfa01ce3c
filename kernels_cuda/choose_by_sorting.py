"""Lists of what a prompt reads, by blocks of keys that are sorted by weight: policies/prefill/pbs_attn.py has the reference. Weights of
keys are those of choose_by_lines."""
import numpy as np

from edgeattn.kernels_cuda import choose_by_lines, compile, prefill_call
from edgeattn.kernels_cuda.choose_by_crossings import LINES
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE

ARGS = (*prefill_call.ARGS, "segment", "tau", "sampled", "pages", "cache.kinds")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
HEAD_DIMS, FRAGMENTS = choose_by_lines.HEAD_DIMS, True
SORT_THREADS = 256


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Weights, and each query head's scores. attributes["pages"]: of all sequences that have lists, and of a page list, at most."""
    scores = 4 * int(attributes["num_heads"]) * prefill_call.most_blocks(rows) * int(attributes["pages"])
    return choose_by_lines.workspace_bytes(tensors, attributes, rows, threads) + scores


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    (blocks, kv_heads, sequences), pages = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most)
    common, rows = prefill_call.choice_args(a), most[a["q.rows"]]
    *weighed, _, _ = choose_by_lines.launches(a | LINES, most)  # up to sums by key and distance, of which it would pick
    _, _, _, by_key, order, numbers, _, _, means, *_ = weighed[-1].args[len(common):]  # LINE_ARGS; distances leave their room
    scores = a["workspace"] + choose_by_lines.workspace_bytes({}, a, rows, 1)
    own = by_key, order, numbers, means, scores, prefill_call.most_blocks(rows), a["pages"], a["segment"], a["tau"], 0

    def launch(name, grid, threads, shared=0):
        kernel = compile.function("choose_by_sorting", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, grid, threads, (*common, *(np.int64(x) for x in own)), shared, overlap=True)
    segments = max(1, pages * PAGE // a["segment"])
    return [*weighed, launch("sort_keys", (-(-pages * PAGE // SORT_THREADS), kv_heads, sequences), SORT_THREADS),
            launch("sorted_means", (segments, kv_heads, sequences), 128),
            launch("choose_by_sorting", (blocks, kv_heads, sequences), prefill_call.THREADS, 5 * pages)]
