"""Lists of what a prompt reads, by the weight of lines that cross pages: policies/prefill/dhsa.py, modes vs and vsb, has the reference.
Weights of keys are those of choose_by_lines."""
import numpy as np

from edgeattn.kernels_cuda import choose_by_lines, compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch

ARGS = (*prefill_call.ARGS, "density", "unit", "sampled", "pages", "cache.kinds")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
HEAD_DIMS, FRAGMENTS = (64, 128), True  # what tensor cores take; whether they read pages as they are
LINES = {"prefill.patterns": 0, "n_v": 0, "n_s": 0}  # what choose_by_lines picks by, and here nobody


def _sizes(heads: int, kv_heads: int, head_dim: int, pages: int) -> list[int]:
    """Where units are pages, bytes of weights by unit and by distance, those of two rows, and mean keys."""
    return [-(-4 * size * pages // 256) * 256 for size in (heads, heads, 2 * heads, kv_heads * head_dim)]


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of all sequences that have lists, and of a page list, at most."""
    if attributes["unit"] == 1:
        return choose_by_lines.workspace_bytes(tensors, attributes, rows, threads)
    return sum(_sizes(*(int(attributes[name]) for name in ("num_heads", "kv_heads", "head_dim", "pages"))))


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    (blocks, kv_heads, sequences), pages, heads = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most), a["num_heads"]
    common = prefill_call.choice_args(a)
    if a["unit"] == 1:
        *weighed, _, _ = choose_by_lines.launches(a | LINES, most)  # up to sums by key and distance, of which it would pick
        _, _, _, by_unit, by_distance, rest, _, _, down, *_ = weighed[-1].args[len(common):]  # LINE_ARGS; sums lie where means would
        means = 0
    else:
        sizes = _sizes(heads, kv_heads, a["head_dim"], a["pages"])
        by_unit, by_distance, rest, means = (a["workspace"] + sum(sizes[:i]) for i in range(4))
        down = by_unit
    own = by_unit, by_distance, rest, down, means, a["pages"], a["unit"], a["density"], 0

    def launch(name, grid, shared=0):
        kernel = compile.function("choose_by_crossings", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, grid, prefill_call.THREADS, (*common, *(np.int64(x) for x in own)), shared, overlap=True)
    if means:
        weighed = [prefill_call.write(a, most), prefill_call.mean_keys(a, most, means), launch("weigh_units", (2, kv_heads, sequences))]
    return [*weighed, launch("pick_crossings", (2, heads, sequences)),
            launch("choose_by_crossings", (blocks, kv_heads, sequences), 5 * pages)]
