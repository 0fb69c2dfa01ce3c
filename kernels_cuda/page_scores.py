"""Scores of pages that take kernels of their own, before select_pages chooses by them."""
import numpy as np

from edgeattn.arguments import CODES
from edgeattn.kernels_cuda import compile
from edgeattn.kernels_cuda.steps import Launch

EXACT = "rank", "max_mass"  # by the keys themselves
SCRATCH = "hierarchy", *EXACT
INDEXED = {"representatives": "representatives", "landmarks": "landmarks", "components": "components_best", "collisions": "collisions"}
THREADS, SHARED = 512, 4 * (2048 + 1024 + 64 + 16 + 64 + 7)  # selection.cuh: Choosing


def launches(a: dict[str, int], args: tuple, sequences: int, parts: int) -> list[Launch]:
    """a, args: of select_pages, less the last; parts: of each KV head's pages, a block each."""
    heads, kv_heads, row = a["num_heads"], a["kv_heads"], 4 * a["head_dim"]
    for score, name in INDEXED.items():
        if a["score"] == CODES[score]:
            kernel = compile.function("page_scores_index", name)
            more = (np.int64(x) for x in (a["selection.components"], a["bits"], parts))
            return [Launch(kernel, (kv_heads * parts, sequences, 1), THREADS, (*args, *more), overlap=True)]
    if a["score"] == CODES["hierarchy"]:
        grid = kv_heads * parts, sequences, 1
        return [Launch(compile.function("page_scores_blocks", "keep_blocks", SHARED), grid, THREADS,
                       (*args, np.int64(a["blocks"]), np.int64(parts)), SHARED, overlap=True),
                Launch(compile.function("page_scores_blocks", "score_kept"), grid, THREADS, (*args, np.int64(parts)), overlap=True)]
    if a["score"] not in [CODES[name] for name in EXACT]:
        return []

    def launch(name, blocks, parts, shared):
        kernel = compile.function("page_scores_exact", name, shared)
        return Launch(kernel, (blocks, sequences, 1), THREADS, (*args, np.int64(parts)), shared, overlap=True)
    found = [launch("token_scores", kv_heads * parts, parts, heads // kv_heads * row)]
    if a["score"] == CODES["rank"]:
        return [*found, launch("rank_pages", heads, 1, SHARED)]
    return [*found, launch("most_mass", kv_heads * parts, kv_heads * parts, heads * row)]
