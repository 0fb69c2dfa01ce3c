"""Which pages a decode step reads of each KV head: their scores and the best of them as lists, in one launch; see the reference."""
import numpy as np

from edgeattn.arguments import CODES
from edgeattn.kernels_cuda import compile, device, page_scores
from edgeattn.kernels_cuda.attention_call import CALL, HEADS, call_args, processors
from edgeattn.kernels_cuda.page_scores import SHARED, THREADS
from edgeattn.kernels_cuda.paged_cache import COUNT, HEADER, PagedCache
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE, PageFormat

SELECTION = (  # in the order of SELECTION_ARGS
    "batch.sealed", "batch.index", "batch.indexed", "selection.width", "workspace.scores", "selection.shares", "selection.stats",
    "score", "combine", "budget", "fraction", "recent", "reach", "reuse", "block", "workspace.softmax")
ARGS = (*CALL, *(name for name in SELECTION if not name.startswith("workspace")), "selection.components", "bits", "blocks")
SCORES = "bound", "mass", "recency", "random", "peak", *page_scores.SCRATCH, *page_scores.INDEXED
MOST_PAGES = 32768
WORKSPACE_ROWS = "sequences"  # the count that `rows` of workspace_bytes is: only decode steps select


def select_pages(q, cos, sin, past_key, positions, components=None, *, num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale,
                 layer=0, capacity, share=1.0, score, rank=0, tables=0, **options):
    import edgeattn.kernels_cuda.select_pages as kernel
    xp = device.cupy()
    cache = PagedCache([PageFormat(head_dim, "f32", "f32")], kv_heads, [past_key.shape[1]], [1], capacity)
    cache.fill(0, past_key, past_key)
    tensors = {name: xp.asarray(np.ascontiguousarray(x, np.float32)) for name, x in dict(q=q, cos=cos, sin=sin).items()}
    block = -(-head_dim // options.get("block", 4))  # as kernels_cpu/page_index.py has it
    width = {"bound": 2 * head_dim, "hierarchy": 2 * head_dim + block, "representatives": block, "landmarks": block,
             "components": PAGE * (rank or head_dim // 4), "collisions": PAGE // 2 * tables}.get(score, 0)
    index, indexed = xp.zeros((1, kv_heads, cache.tables.shape[2], width), np.uint16), xp.zeros((1, kv_heads), np.int32)
    rows = xp.asarray([index.data.ptr if width else 0, indexed.data.ptr], np.int64)
    shares, positions = xp.full(kv_heads, share, np.float32), xp.asarray(positions, np.int64)
    vectors = None if components is None else xp.asarray(np.ascontiguousarray(components, np.float32))
    attributes = dict(num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved,
                      scale=scale, reuse=0.0, **{"block": 1, "combine": "head", "budget": 0, "fraction": 0.0, "reach": 1.0} | options)
    cache.run(kernel, tensors, attributes | {"score": score}, {
        "batch.positions": positions.data.ptr, "batch.index": rows.data.ptr, "batch.indexed": rows.data.ptr + 8, "selection.width": width,
        "selection.shares": shares.data.ptr, "selection.stats": 0, "selection.components": 0 if components is None else vectors.data.ptr})
    lists = cache.selection.get()[0, 0]
    return lists[:, HEADER:], lists[:, COUNT]


def _score_bytes(places: int, pages: int) -> int:
    return -(-4 * places * pages // 16) * 16


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Scores of all pages and, for those by weight, each query head's part of the softmax in them. A page list may be longer than the
    context: a chunk comes on top before heads drop what is over."""
    pages = int(attributes["cache.max_pages"])
    parted = attributes.get("score", "mass") in ("mass", *page_scores.SCRATCH)
    softmax = 8 * rows * int(attributes["num_heads"]) * (pages + 1) if parted else 0
    return _score_bytes(rows * int(attributes["kv_heads"]), pages) + softmax


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    if a["score"] not in [CODES[name] for name in SCORES]:
        raise ValueError(f"CUDA selection scores pages by {', '.join(SCORES)}; choose a policy that does, or run with --device cpu")
    if a["num_heads"] // a["kv_heads"] > HEADS or a["head_dim"] > 256:
        raise ValueError(f"CUDA selection takes {HEADS} query heads a KV head and 256 channels at most; run with --device cpu")
    if a["cache.keys_rotated"] and a["selection.components"]:
        raise ValueError("CUDA selection multiplies rotated keys with no vectors but queries; run with --device cpu")
    if a["cache.max_pages"] > MOST_PAGES:
        raise ValueError(f"CUDA selection chooses among {MOST_PAGES} pages at most, the cache may hold {a['cache.max_pages']}; "
                         "choose a smaller --ctx-size")
    if a["selection.group"] < 0:
        return []
    sequences, places = most[a["batch.sequences"]], most[a["batch.sequences"]] * a["kv_heads"]
    parts = max(1, min(64, processors() // places, -(-most["slots"] // (PAGE * THREADS // 32))))
    made = a | {"workspace.scores": a["workspace"], "workspace.softmax": a["workspace"] + _score_bytes(places, a["cache.max_pages"])}
    args = (*call_args(a), *(np.int64(made[name]) for name in SELECTION))
    before = page_scores.launches(a, args, sequences, parts)
    parts = 1 if before else parts
    kernel = compile.function("select_pages", "select_pages", SHARED)
    return [*before, Launch(kernel, (a["kv_heads"] * parts, sequences, 1), THREADS, (*args, np.int64(parts)), SHARED, overlap=True)]
