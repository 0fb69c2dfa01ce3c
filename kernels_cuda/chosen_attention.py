"""select_pages and cached_attention of a decode step as one launch (chosen_attention.cu): where pages are chosen by bounds out of the
parameters of quantised keys, each KV head by itself, and the device holds all blocks at once. What differs stays two launches."""
from dataclasses import dataclass

import numpy as np

from edgeattn.arguments import CODES
from edgeattn.kernels_cuda import attention_call, cached_attention, compile, exchange
from edgeattn.kernels_cuda.attention_call import BLOCKS, CALL, HEADS, call_args, processors
from edgeattn.kernels_cuda.attention_in_part import asked
from edgeattn.kernels_cuda.cached_attention import block_bytes, ring_bytes
from edgeattn.kernels_cuda.page_pool import INT4, MIXED
from edgeattn.kernels_cuda.paged_cache import HEADER
from edgeattn.kernels_cuda.select_pages import SELECTION
from edgeattn.kernels_cuda.steps import Launch, as_f32
from edgeattn.page_formats import PAGE

ARGS = cached_attention.ARGS
CHOICE = "choice"  # among the arguments: those of select_pages
KERNELS = {INT4: "chosen_int4", MIXED: "chosen_mixed"}
WARPS, MOST_BLOCKS, MOST_PAGES, MOST_REACH = 8, 16, exchange.MOST_SCORES, 8.0
TILE, MOST_TILES = 16, 3  # pages that a warp scores together (bound_tiles.cuh); of them, under way at once
BEST_BYTES = 5728  # best_pages.cuh, Best, and what a list is to become
OWN = ("k", "k.stride", "v", "v.stride", "out", "out.stride", "window", "batch.compensation", "workspace")  # of attention
SAME = tuple(name for name in CALL if name not in OWN)


@dataclass(frozen=True)
class Plan:
    """blocks: of a KV head; room: bytes for choosing, then for attention; pages: of a page table; tiles: whose bounds a warp has under
    way; shared: bytes in all"""
    blocks: int
    stages: int
    room: int
    pages: int
    tiles: int
    shared: int


def takes(choice: dict, a: dict, most: dict) -> bool:
    """Whether the steps select_pages and cached_attention with these arguments become one in a bucket."""
    if not (most.get("sparse") and a["cache.exchange"]) or any(choice[name] != a[name] for name in SAME) or asked(a, most):
        return False
    bounds = choice["score"] == CODES["bound"] and choice["combine"] == CODES["head"] and not choice["selection.width"]
    return (bounds and 0 <= as_f32(choice["reach"]) <= MOST_REACH and not choice["selection.components"]
            and not a["cache.keys_rotated"] and a["cache.kinds"] in KERNELS and a["head_dim"] in (64, 128)
            and a["num_heads"] // a["kv_heads"] <= HEADS and a["selection.group"] >= 0 and plan(a, most) is not None)


def blocks_of(places: int) -> int:
    """Of each (sequence, KV head), at most."""
    most = max(1, exchange.most_blocks() // places)
    return min(MOST_BLOCKS, 1 << most.bit_length() - 1)


def plan(a: dict, most: dict) -> Plan | None:
    """How a bucket is launched: with room for the next kernel's blocks beside this one's, if there can be any; None where the device does
    not hold two blocks of each KV head at once."""
    kinds, depth, places = a["cache.kinds"], a["head_dim"], most[a["batch.sequences"]] * a["kv_heads"]
    pages, blocks = min(-(-most["slots"] // PAGE), a["cache.max_pages"]), blocks_of(places)
    if pages > MOST_PAGES or places > exchange.MOST_GANGS:
        return None
    while blocks >= 2:
        most_tiles = max(1, min(MOST_TILES, -(-pages // (TILE * blocks * WARPS))))
        plans = [_plan(kinds, depth, blocks, stages, pages, tiles, a["selection.capacity"]) for stages in (3, 2)
                 for tiles in range(most_tiles, 0, -1)]
        held = [min(BLOCKS, attention_call.attribute("MaxSharedMemoryPerMultiprocessor") // (p.shared + 1024)) for p in plans]
        best = max(held)
        if places * blocks <= processors() * best:
            return plans[held.index(best)]
        blocks //= 2
    return None


def _plan(kinds, depth, blocks, stages, pages, tiles, capacity) -> Plan:
    scoring = max(4 * (pages + 32), 4 * TILE * depth * WARPS * tiles)
    room = -(-max(WARPS * ring_bytes(kinds, depth, stages), 64 * depth + BEST_BYTES + scoring) // 16) * 16
    return Plan(blocks, stages, room, pages, tiles, block_bytes(depth, WARPS) + room + 4 * (pages + HEADER + capacity))


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    return cached_attention.launches(a, most, _launch(a, most))


def _launch(a, most):
    p, choice = plan(a, most), a[CHOICE] | {"workspace.scores": 0, "workspace.softmax": 0}
    args = (*call_args(a), *(np.int64(choice[name]) for name in SELECTION), *(np.int64(x) for x in (p.stages, p.room, p.pages, p.tiles)),
            *exchange.arguments(a["cache.exchange"]))
    function = compile.function("chosen_attention", f"{KERNELS[a['cache.kinds']]}_{a['head_dim']}", p.shared)
    grid = p.blocks, a["kv_heads"], most[a["batch.sequences"]]
    return Launch(function, grid, 32 * WARPS, args, p.shared, overlap=True, gang=p.blocks)
