"""Lists of what a prompt reads, by true weights of some queries: policies/prefill/sample_attention.py and flex_prefill.py have the
references."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch

# segment 0: all of a prompt's new tokens; below 0: no estimates
OWN = "sampled", "apart", "segment", "part_down", "part_across", "fewest", "below"
ARGS = (*prefill_call.ARGS, *OWN, "pages", "cache.kinds")
FOR_PROMPTS = True        # launched where some sequence has lists
WORKSPACE_ROWS = "tokens"
HEAD_DIMS, FRAGMENTS = (64, 128), True  # what tensor cores take; whether they read pages as they are
TILE = 16                 # rows
PIECE_BYTES = 64 << 20    # of partial results, which rows are weighed in pieces for


def _sizes(about: dict, max_pages: int, tokens: int) -> dict[str, int]:
    """Bytes of each array, in the order of SAMPLE_ARGS; tile_places, and tiles in each: blocks of queries, or without segments sequences;
    rows of a KV head that a sequence has at most, and of a piece."""
    heads, kv_heads, head_dim, pages = (int(about[name]) for name in ("num_heads", "kv_heads", "head_dim", "pages"))
    group, sampled, segment = heads // kv_heads, int(about["sampled"]), int(about["segment"])
    places, tiles = prefill_call.most_blocks(tokens), -(-sampled * group // TILE)
    tile_places, rows = places if segment else prefill_call.most_lists(tokens), group * sampled * (-(-tokens // segment) if segment else 1)
    piece = min(-(-rows // TILE), max(1, PIECE_BYTES // (8 * kv_heads * pages * TILE))) * TILE
    found = {"arranged": 2 * kv_heads * tile_places * tiles * TILE * head_dim, "partials": 8 * kv_heads * piece * pages,
             "totals": 4 * kv_heads * tile_places * tiles * TILE, "page_sums": 4 * heads * pages, "band_sums": 4 * heads * pages}
    estimated = {"means": 4 * pages * kv_heads * head_dim, "newest": 4 * heads * pages, "estimates": 4 * heads * places * max_pages}
    found |= estimated if about["below"] else dict.fromkeys(estimated, 0)
    found |= {"flags": 4 * kv_heads * pages, "maps": 4 * kv_heads * places * -(-max_pages // 32)}
    counts = {"tile_places": tile_places, "tiles": tiles, "rows": rows, "piece": piece}
    return {name: -(-size // 256) * 256 for name, size in found.items()} | counts


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """attributes["pages"]: of all sequences that have lists, and of a page list, at most."""
    *sizes, _, _, _, _ = _sizes(attributes, int(attributes["pages"]), rows).values()
    return sum(sizes)


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    if not a["cache.kinds"] or a["head_dim"] not in HEAD_DIMS or a["cache.keys_rotated"]:
        raise ValueError(f"CUDA kernels sample queries of heads of {HEAD_DIMS} channels, over pages of halves and of codes by channel; "
                         "choose another --sparse-prefill")
    (blocks, kv_heads, sequences), pages, heads = prefill_call.blocks_grid(a, most), prefill_call.pages_of(a, most), a["num_heads"]
    *sizes, tile_places, tiles, rows, piece = _sizes(a, a["cache.max_pages"], most[a["q.rows"]]).values()
    places, offsets = prefill_call.most_blocks(most[a["q.rows"]]), np.cumsum([0, *sizes[:-1]])
    own = [a["workspace"] + x if size else 0 for x, size in zip(offsets, sizes)]
    args = (*prefill_call.choice_args(a), *(np.int64(x) for x in (*own, places, a["pages"], tile_places, tiles, piece,
                                                                  *(a[name] for name in OWN))))

    def weigh(name, grid, threads, first=0):
        return Launch(compile.function("sampled_weights", name), grid, threads, (*args, np.int64(first)), overlap=True)

    def choose(name, grid, shared=0):
        kernel = compile.function("choose_by_samples", name, shared + prefill_call.STATIC if shared else 0)
        return Launch(kernel, grid, prefill_call.THREADS, (*args, np.int64(0)), shared, overlap=True)

    def weighed(first):
        return [weigh(f"score_samples_{a['head_dim']}", (-(-pages // 2), kv_heads, sequences), 128, first),
                weigh("sample_totals", (piece // 8, kv_heads, sequences), 256, first),
                weigh("sample_sums", (-(-pages // 32), heads, sequences), 256, first)]
    estimates = [prefill_call.mean_keys(a, most, own[5]), choose("estimate_pages", (blocks + 1, kv_heads, sequences))] if a["below"] else []
    return [prefill_call.write(a, most), weigh("arrange_samples", (-(-rows // TILE), kv_heads, sequences), 256),
            *(launch for first in range(0, rows, piece) for launch in weighed(first)), *estimates,
            choose("pick_samples", (3 if estimates else 2, heads, sequences)),
            choose("choose_by_samples", (blocks, kv_heads, sequences), pages)]
