"""How much attention cached tokens receive: what cached_attention runs besides where the cache asks for it (attention_mass.cu)."""
import numpy as np

from edgeattn.kernels_cuda import compile
from edgeattn.kernels_cuda.attention_call import MOST_PLACES, call_args, ranges_of
from edgeattn.kernels_cuda.steps import Launch
from edgeattn.page_formats import PAGE

MASS = ("batch.attention_mass", "cache.mass_mode", "cache.mass_plane", "batch.probes")
TILE, RANGES = 8, 32  # queries that a warp scores at once; ranges of pages at most


def workspace_bytes(rows: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """Rotated queries, and what the ranges know of their softmax."""
    return kv_heads * _tiles(rows, heads // kv_heads) * TILE * 4 * (head_dim + 2 * (RANGES + 1))


def _tiles(rows, group):
    return -(-rows * group // TILE)


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    sequences, probes, heads = most[a["batch.sequences"]], most[a["batch.probes"]], a["kv_heads"]
    if not a["cache.mass_mode"] or not probes:
        return []
    if sequences * heads > MOST_PLACES:
        raise ValueError(f"{sequences} sequences are too many for {heads} KV heads; run fewer at once")
    ranges = min(RANGES, ranges_of(sequences * heads, most["slots"]))
    tiles = _tiles(most[a["q.rows"]], a["num_heads"] // heads)
    args = (*call_args(a), *(np.int64(a[name]) for name in MASS), np.int64(ranges), np.int64(tiles))
    shared, grid = 4 * PAGE * a["head_dim"], (heads * ranges, sequences, 1)
    return [Launch(compile.function("attention_mass", "mass_queries"), (heads, probes, sequences), 128, args, overlap=True),
            *(Launch(compile.function("attention_mass", name, shared), grid, 256, args, shared, overlap=True)
              for name in ("mass_tops", "mass_add"))]
