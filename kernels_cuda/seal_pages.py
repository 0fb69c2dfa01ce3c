"""Whole pages of floats to quantised ones; see the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, device
from edgeattn.kernels_cuda.page_pool import POOLS, Pages, make_table
from edgeattn.kernels_cuda.steps import Launch, run as run_launches
from edgeattn.page_formats import PAGE, PageFormat

ARGS = ("pools", "sources", "sources.rows", "targets", "head_dim", "state")
MOST_DEPTH = 256
SHARED = 4 * (MOST_DEPTH * PAGE + 4 * MOST_DEPTH + 18)  # seal_pages.cu, Sealing


def seal_pages(k, v, *, k_type, v_type, k_axis="channel", one_group=0, separated=0, threshold=0.0, gate=16, refresh=0.0):
    xp, head_dim, count = device.cupy(), k.shape[1], len(k)
    floats = Pages(PageFormat(head_dim, "f32", "f32"), count)
    codes = Pages(PageFormat(head_dim, k_type, v_type, k_axis, bool(one_group), bool(separated), threshold, gate, refresh), count)
    floats.k.view(np.float32)[:] = xp.asarray(k.reshape(count, -1))
    floats.v.view(np.float32).reshape(count, PAGE, -1)[..., :head_dim] = xp.asarray(v)
    run(make_table([floats, codes]), head_dim, np.arange(count) * POOLS, np.arange(count) * POOLS + 1)
    return tuple(array.get() for array in codes.arrays().values())


def run(table, head_dim: int, sources, targets) -> None:
    """Quantise the pages of entries `sources` into those of `targets`; table: page_pool.make_table."""
    xp = device.cupy()
    sources, targets, state = xp.asarray(sources, np.int32), xp.asarray(targets, np.int32), xp.asarray([len(sources)], np.int64)
    a = {"pools": table.data.ptr, "sources": sources.data.ptr, "sources.rows": 0, "targets": targets.data.ptr, "head_dim": head_dim,
         "state": state.data.ptr}
    if len(sources):
        run_launches(launches(a, {0: len(sources)}))
        xp.cuda.get_current_stream().synchronize()  # the entries lie in memory that is given back here


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    if a["head_dim"] > MOST_DEPTH:
        raise ValueError(f"CUDA kernels take heads of at most {MOST_DEPTH} channels, got {a['head_dim']}; run on the CPU with --device cpu")
    args = tuple(np.int64(a[name]) for name in ("pools", "sources", "targets", "head_dim", "sources.rows", "state"))
    return [Launch(compile.function("seal_pages", "seal_pages", SHARED), (most[a["sources.rows"]], 1, 1), 128, args, SHARED, overlap=True)]
