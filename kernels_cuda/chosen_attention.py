"""select_pages and cached_attention of a decode step as one launch (chosen_attention.cu): where pages are chosen by bounds out of the
parameters of quantised keys, each KV head by itself, and the device holds all blocks at once. What differs stays two launches."""
import ctypes
from dataclasses import dataclass

import numpy as np

from edgeattn.arguments import CODES
from edgeattn.kernels_cuda import attention_call, cached_attention, compile, device
from edgeattn.kernels_cuda.attention_call import BLOCKS, HEADS, call_args, processors
from edgeattn.kernels_cuda.cached_attention import LATER, block_bytes, ring_bytes
from edgeattn.kernels_cuda.page_pool import INT4, MIXED
from edgeattn.kernels_cuda.paged_cache import HEADER
from edgeattn.kernels_cuda.select_pages import SELECTION, score_bytes
from edgeattn.kernels_cuda.steps import ANY_CLUSTER, Launch, as_f32
from edgeattn.page_formats import PAGE

ARGS = cached_attention.ARGS
CHOICE = "choice"  # among the arguments: those of select_pages
KERNELS = {(INT4, 8): "chosen_int4", (MIXED, 8): "chosen_mixed", (INT4, 16): "chosen_wide_int4"}  # by pages and warps of a block
MOST_BLOCKS, MOST_PAGES, MOST_REACH = 16, 8192, 8.0
TILE, MOST_TILES = 8, 3  # pages that a warp scores together (bound_tiles.cuh); of them, under way at once
BEST_BYTES = 5728  # best_pages.cuh, Best, and what a list is to become
SAME = "q", "q.stride", "layer", "selection.group", "selection.capacity", "batch.selections", "batch.positions", "state"


@dataclass(frozen=True)
class Plan:
    """blocks: of a KV head; room: bytes for choosing, then for attention; pages: of a page table; tiles: of eight pages whose bounds a
    warp has under way; shared: bytes in all"""
    blocks: int
    warps: int
    cluster: bool
    stages: int
    room: int
    pages: int
    tiles: int
    shared: int


def takes(choice: dict, a: dict, most: dict) -> bool:
    """Whether the steps select_pages and cached_attention with these arguments become one in a bucket."""
    if not most.get("sparse") or any(choice[name] != a[name] for name in SAME) or any(a[name] for name in LATER):
        return False
    bounds = choice["score"] == CODES["bound"] and choice["combine"] == CODES["head"] and not choice["selection.width"]
    return (bounds and 0 <= as_f32(choice["reach"]) <= MOST_REACH and not choice["selection.components"]
            and not a["cache.keys_rotated"] and a["cache.kinds"] in (INT4, MIXED) and a["head_dim"] in (64, 128)
            and a["num_heads"] // a["kv_heads"] <= HEADS and a["selection.group"] >= 0 and plan(a, most) is not None)


def shape(places: int) -> tuple[int, int, bool]:
    """Blocks of each (sequence, KV head), their warps, and whether they are a cluster of the hardware's. Not measured yet."""
    most = max(1, BLOCKS * processors() // places)
    return min(MOST_BLOCKS, 1 << most.bit_length() - 1), 8, False


def plan(a: dict, most: dict) -> Plan | None:
    """How a bucket is launched; None where the device does not hold two blocks of each KV head at once."""
    kinds, depth, places = a["cache.kinds"], a["head_dim"], most[a["batch.sequences"]] * a["kv_heads"]
    pages = min(-(-most["slots"] // PAGE), a["cache.max_pages"])
    blocks, warps, cluster = shape(places)
    while blocks >= 2 and pages <= MOST_PAGES and (kinds, warps) in KERNELS:
        needed = max(1, min(MOST_TILES, -(-pages // (TILE * blocks * warps))))
        for stages, tiles in ((3, needed), *((2, tiles) for tiles in range(needed, 0, -1))):
            scoring = max(4 * (pages + 32), 4 * TILE * depth * warps * tiles)
            room = max(warps * ring_bytes(kinds, depth, stages), 64 * depth + BEST_BYTES + scoring)
            shared = block_bytes(depth, warps) + room + 4 * (pages + HEADER + a["selection.capacity"])
            held = min(BLOCKS * 8 // warps, attention_call.attribute("MaxSharedMemoryPerMultiprocessor") // (shared + 1024))
            if places * blocks <= processors() * held:
                return Plan(blocks, warps, cluster, stages, room, pages, tiles, shared)
        blocks //= 2
    return None


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    return cached_attention.launches(a, most, _launch(a, most))


def _launch(a, most):
    p, choice, sequences, kv_heads = plan(a, most), a[CHOICE], most[a["batch.sequences"]], a["kv_heads"]
    scores = choice["workspace"]
    call = call_args(a | {"workspace": scores + score_bytes(sequences * kv_heads, a["cache.max_pages"])})  # partial results behind them
    made = choice | {"workspace.scores": scores, "workspace.softmax": 0}
    args = *call, *(np.int64(made[name]) for name in SELECTION), *(np.int64(x) for x in (p.stages, p.room, p.pages, p.tiles))
    function = compile.function("chosen_attention", f"{KERNELS[a['cache.kinds'], p.warps]}_{a['head_dim']}", p.shared)
    if p.cluster and p.blocks > 8:
        device.driver().cuFuncSetAttribute(ctypes.c_void_p(function.ptr), ANY_CLUSTER, 1)
    return Launch(function, (p.blocks, kv_heads, sequences), 32 * p.warps, args, p.shared, overlap=True, gang=p.blocks,
                  cluster=p.cluster)
