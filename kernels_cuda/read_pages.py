"""The keys and values of whole pages of any format as floats; see the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, device
from edgeattn.kernels_cuda.page_pool import POOLS, Pages, make_table
from edgeattn.kernels_cuda.steps import Launch, run as run_launches
from edgeattn.page_formats import PAGE, PageFormat

ARGS = ("pools", "entries", "entries.rows", "k", "v", "head_dim", "state")


def read_pages(k_codes, k_params, v_codes, v_params, *, head_dim, k_type, v_type, k_axis="channel", one_group=0, separated=0, gate=16):
    pages = Pages(PageFormat(head_dim, k_type, v_type, k_axis, bool(one_group), bool(separated), gate=gate), len(k_codes))
    for array, given in zip(pages.arrays().values(), (k_codes, k_params, v_codes, v_params)):
        array[:] = device.cupy().asarray(given)
    k, v = run(make_table([pages]), head_dim, np.arange(len(k_codes)) * POOLS)
    return k.get(), v.get()


def run(table, head_dim: int, entries):
    """-> k [pages, head_dim, 32], v [pages, 32, head_dim] float32, on the device, of the pages named by `entries`.

    table: page_pool.make_table's
    """
    xp = device.cupy()
    entries = xp.asarray(entries, np.int32)
    k, v = xp.empty((len(entries), head_dim, PAGE), np.float32), xp.empty((len(entries), PAGE, head_dim), np.float32)
    state = xp.asarray([len(entries)], np.int64)
    a = {"pools": table.data.ptr, "entries": entries.data.ptr, "entries.rows": 0, "k": k.data.ptr, "v": v.data.ptr, "head_dim": head_dim,
         "state": state.data.ptr}
    if len(entries):
        run_launches(launches(a, {0: len(entries)}))
    xp.cuda.get_current_stream().synchronize()  # the entries lie in memory that is given back here
    return k, v


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    args = tuple(np.int64(a[name]) for name in ("pools", "entries", "k", "v", "head_dim", "entries.rows", "state"))
    return [Launch(compile.function("read_pages", "read_pages"), (most[a["entries.rows"]], 1, 1), 128, args, overlap=True)]
