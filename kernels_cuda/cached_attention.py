"""Attention over a paged cache for a whole batch; see the reference. Decode is one launch: the kernel that the cache's pages ask for
rotates, writes the new tokens, attends and merges. Prefill writes first. What tensor cores do not take, attention_rows.cu does; what
eviction wants to know, attention_mass.cu; decode that reads pages in part is attention_in_part.cu."""
import numpy as np

from edgeattn.kernels_cuda import attention_in_part, attention_mass, compile, device, exchange
from edgeattn.kernels_cuda.attention_call import (BLOCKS, CALL, HEADS, MOST_PLACES, attribute, call_args, partial_bytes, processors,
                                                  ranges_of)
from edgeattn.kernels_cuda.attention_in_part import IN_PART
from edgeattn.kernels_cuda.page_pool import ANY, FIELDS, HALVES, INT4, MIXED, POOLS
from edgeattn.kernels_cuda.paged_cache import PagedCache
from edgeattn.kernels_cuda.steps import Launch, gangs_at_once
from edgeattn.page_formats import PAGE, PageFormat

ARGS = (*CALL, "cache.kinds", "cache.exchange", "batch.chunks", "prefill.correction", *attention_mass.MASS, *IN_PART)
DECODE = {HALVES: "f16", INT4: "int4", MIXED: "mixed"}
ONE_ROW, MORE_ROWS = 1, 2
FEWEST_BLOCKS = 8  # of a KV head, where they merge together
WARPS = {HALVES: 4, INT4: 8, MIXED: 8}          # of a block of decode
SIDE_BYTES = {HALVES: 64, INT4: 20, MIXED: 36}  # of a page's keys or values in shared memory, for each channel
SIDES = 32  # whose places a warp of decode keeps in shared memory
ROWS_SHARED = 4 * (5 * HEADS * 256 + 4 * HEADS * 34)  # attention_rows.cu, Rows
MOST_DEPTH, DEPTHS = 256, (64, 128)  # channels of a head: of attention_rows.cu, on tensor cores
MOST_GRID = (1 << 16) - 1  # blocks of a grid's second dimension: tokens
QUERY_ROWS, SHORT_ROWS, QUERY_BLOCK, KEYS, PREFILL_THREADS = 128, 64, 64, 64, 128  # attention_prefill.cu
MEANS_BYTES = 128             # attention_tail.cu: of 32 pages, a KV head and a channel
NONE, TAIL, DELTA = range(3)  # what makes good what a prompt does not read (prefill_lists.py)
MOST_FIRST_RANGES = 32        # with which partial results of a prompt's first rows fit where decode's do


def cached_attention(q, k, v, cos, sin, past_key, past_value, positions, *,
                     num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale, window=0, layer=0):
    cache = PagedCache([PageFormat(head_dim, "f32", "f32")], kv_heads, [past_key.shape[1]], [len(q)])
    cache.fill(0, past_key, past_value)
    out = attend(cache, q, k, v, cos, sin, positions, num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim,
                 interleaved=interleaved, scale=scale, window=window)
    return out, *cache.read(0)


def attend(cache: PagedCache, q, k, v, cos, sin, positions, *, extra: dict | None = None, **attributes) -> np.ndarray:
    """Run one step over all sequences of `cache`, their new tokens one after the other in q, k, v, NumPy arrays; -> out."""
    import edgeattn.kernels_cuda.cached_attention as kernel
    xp = device.cupy()
    tensors = {name: xp.asarray(np.ascontiguousarray(x, np.float32)) for name, x in dict(q=q, k=k, v=v, cos=cos, sin=sin).items()}
    tensors["out"], positions = xp.full(q.shape, np.nan, np.float32), xp.asarray(positions, np.int64)
    cache.run(kernel, tensors, attributes, {"batch.positions": positions.data.ptr} | (extra or {}))
    return tensors["out"].get()


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of all sequences that have lists; without it as many as of a page list."""
    sizes = rows, *(int(attributes[name]) for name in ("num_heads", "kv_heads", "head_dim"))
    pages = int(attributes.get("pages", attributes.get("cache.max_pages", 0))) if attributes.get("prefill.correction") == TAIL else 0
    means = -(-pages // PAGE) * MEANS_BYTES * sizes[2] * sizes[3]
    return max(partial_bytes(*sizes), attention_mass.workspace_bytes(*sizes), means)


def launches(a: dict[str, int], most: dict, decode: Launch | None = None) -> list[Launch]:
    """decode: what takes the place of the kernel that serves sequences with one token (chosen_attention.py)."""
    if a["head_dim"] > MOST_DEPTH:
        raise ValueError(f"CUDA kernels take heads of at most {MOST_DEPTH} channels, got {a['head_dim']}; run on the CPU with --device cpu")
    sequences, tokens, slots = most[a["batch.sequences"]], most[a["q.rows"]], most["slots"]
    group = a["num_heads"] // a["kv_heads"]
    fast = takes_heads(a["head_dim"], group) and takes_fragments(a["cache.kinds"], a["cache.keys_rotated"])
    found, listed = [], most.get("listed", False)  # then who chose has written the new tokens of prompts
    in_part = attention_in_part.asked(a, most)
    correction = a["prefill.correction"] if listed else NONE
    if correction and not fast:
        raise ValueError("CUDA kernels correct what a prompt does not read of heads of 64 or 128 channels in pages of halves and of codes "
                         "by channel; use --prefill-correction none")
    if fast and in_part:
        found += [write(a, tokens, ONE_ROW), attention_in_part.launch(a, sequences, slots)]
    elif fast:
        found.append(decode or _decode(a, sequences, slots))
    if fast and tokens > 1:
        prefill = _tail(a, tokens, sequences, slots) if correction == TAIL else [_prefill(a, tokens, sequences, listed)]
        found += [*([] if listed else [write(a, tokens, MORE_ROWS)]), *prefill,
                  *(_delta(a, tokens, sequences, slots) if correction == DELTA else [])]
    elif not fast:
        found += [write(a, tokens, ONE_ROW | MORE_ROWS)] + ([_rows(a, tokens, slots, MORE_ROWS)] if in_part and tokens > 1 else [])
        found.append(attention_in_part.launch(a, sequences, slots) if in_part else _rows(a, tokens, slots, ONE_ROW | MORE_ROWS))
    return found + attention_mass.launches(a, most)


def takes_fragments(kinds: int, rotated: bool) -> bool:
    """Whether tensor cores read such pages (page_fragments.cuh)."""
    return kinds != ANY and not rotated


def takes_heads(head_dim: int, group: int) -> bool:
    return head_dim in DEPTHS and group <= HEADS


def most_rows(heads: int, kv_heads: int, head_dim: int, kinds: int, rotated: bool) -> int:
    """Tokens of a call at most."""
    group = heads // kv_heads
    if takes_heads(head_dim, group) and takes_fragments(kinds, rotated):
        return MOST_GRID
    return min(MOST_GRID, MOST_PLACES // (kv_heads * -(-group // HEADS)))


def decode_shared(kinds: int, head_dim: int, stages: int, warps: int) -> int:
    """Bytes of shared memory: decode_block.cuh, Shared, and the rings of sides or what becomes of them."""
    return block_bytes(head_dim, warps) + warps * ring_bytes(kinds, head_dim, stages)


def block_bytes(head_dim: int, warps: int) -> int:
    """Of Shared."""
    fixed = 4 * HEADS * head_dim + 16 * head_dim + 4 * HEADS * (1 + 2 * warps) + 4 * warps * HEADS * head_dim // 32 + 8 * head_dim
    fixed += 4 * HEADS
    return -(-(fixed + 96 + 8 * POOLS * FIELDS + 4 * warps * HEADS * 36) // 128) * 128


def ring_bytes(kinds: int, head_dim: int, stages: int) -> int:
    """Of a warp."""
    return max(16 * SIDES + stages * SIDE_BYTES[kinds] * head_dim, 4 * HEADS * (head_dim + 4))


def _decode(a, sequences, slots):
    """All blocks of a KV head merge, where the device holds all of the launch at once; else the last one to end."""
    kinds, depth, places = a["cache.kinds"], a["head_dim"], sequences * a["kv_heads"]
    warps, blocks = WARPS[kinds], ranges_of(places, slots) + 1
    room = attribute("MaxSharedMemoryPerMultiprocessor") // BLOCKS - 1024
    stages = next((stages for stages in (3, 2) if decode_shared(kinds, depth, stages, warps) <= room), 2)
    shared = decode_shared(kinds, depth, stages, warps)
    kernel = compile.function("cached_attention", f"decode_{DECODE[kinds]}_{depth}", shared)

    def launch(memory):
        args = *call_args(a), np.int64(stages), *exchange.arguments(memory)
        return Launch(kernel, (blocks, a["kv_heads"], sequences), 32 * warps, args, shared, overlap=True, gang=blocks if memory else 1)
    together = launch(a["cache.exchange"])
    fits = FEWEST_BLOCKS <= blocks <= exchange.most_blocks() // places and places <= exchange.MOST_GANGS
    return together if fits and gangs_at_once(together) >= places else launch(0)


def write(a: dict[str, int], tokens: int, which: int) -> Launch:
    """New keys, rotated, and values into their pages."""
    kernel = compile.function("attention_rows", "write_tokens")
    return Launch(kernel, (a["kv_heads"], tokens, 1), 128, (*call_args(a), np.int64(which)), overlap=True)


def _prefill(a, tokens, sequences, listed):
    depth, rows, name = a["head_dim"], QUERY_ROWS, "prefill"
    if _tiles(a, tokens, rows, listed) * a["kv_heads"] * sequences <= processors():  # smaller blocks give each processor two
        rows, name = SHORT_ROWS, "short_prefill"
    grid, shared = (_tiles(a, tokens, rows, listed), a["kv_heads"], sequences), _prefill_shared(depth)
    kernel = compile.function("attention_prefill", f"{name}_{depth}", shared)
    return Launch(kernel, grid, PREFILL_THREADS, (*call_args(a), np.int64(0)), shared, overlap=True)


def _tail(a, tokens, sequences, slots) -> list[Launch]:
    """Pages that lists leave out count as their means."""
    depth, heads, pages = a["head_dim"], a["kv_heads"], min(a["cache.max_pages"], -(-slots // PAGE))
    args, shared = (*call_args(a), np.int64(a["batch.chunks"]), np.int64(a["workspace"])), _prefill_shared(depth)
    attend = compile.function("attention_tail", f"tail_prefill_{depth}", shared)
    return [Launch(compile.function("attention_tail", "page_means"), (pages, heads, sequences), 128, args, overlap=True),
            Launch(attend, (_tiles(a, tokens, SHORT_ROWS, True), heads, sequences), PREFILL_THREADS, args, shared, overlap=True)]


def _tiles(a, tokens, rows, listed) -> int:
    """Blocks of so many rows."""
    each = rows // (a["num_heads"] // a["kv_heads"])  # tokens of a block
    return -(-tokens // (min(QUERY_BLOCK, 1 << each.bit_length() - 1) if listed else each))


def _prefill_shared(head_dim: int) -> int:
    return 2 * head_dim * (QUERY_ROWS + 2 * KEYS) + 4 * QUERY_ROWS + 8 * KEYS


def _delta(a, tokens, sequences, slots) -> list[Launch]:
    """The first query of each block against everything, and what that changes for the others."""
    heads, kv_heads, depth, blocks = a["num_heads"], a["kv_heads"], a["head_dim"], -(-tokens // QUERY_BLOCK)
    tiles, places, shared = -(-blocks // (SHORT_ROWS // (heads // kv_heads))), tokens // 32 + 1, _prefill_shared(depth)
    ranges = max(1, min(MOST_FIRST_RANGES, BLOCKS * processors() // (tiles * kv_heads * sequences), -(-slots // (4 * KEYS))))
    args = (*call_args(a), *(np.int64(x) for x in (a["batch.chunks"], ranges, places)))
    first = compile.function("attention_prefill", f"first_rows_{depth}", shared)
    return [Launch(first, (tiles * ranges, kv_heads, sequences), PREFILL_THREADS, args, shared, overlap=True),
            Launch(compile.function("attention_prefill", "add_shifts"), (blocks, heads, sequences), depth, args, overlap=True)]


def _rows(a, tokens, slots, which):
    """Float32, for pages of any format."""
    parts = -(-(a["num_heads"] // a["kv_heads"]) // HEADS)
    if tokens * a["kv_heads"] * parts > MOST_PLACES:
        raise ValueError(f"a chunk of {tokens} tokens is too long for {a['kv_heads']} KV heads; choose a smaller --ubatch-size")
    ranges = ranges_of(tokens * a["kv_heads"] * parts, slots)
    kernel = compile.function("attention_rows", "attend_rows", ROWS_SHARED)
    args = (*call_args(a), np.int64(which), np.int64(ranges))
    return Launch(kernel, (a["kv_heads"] * parts * ranges, tokens, 1), 128, args, ROWS_SHARED, overlap=True)
