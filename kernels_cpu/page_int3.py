"""KV type int3: how its rows are read and written (page_formats.py), and the workers made of that."""
from numba import njit, uint8

from edgeattn.kernels_cpu.floats import F, I
from edgeattn.kernels_cpu.page_rows import add_rows_by, expand_rows_by, pack_rows_by
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, convert, load, store, u8

B = u8(16)


@njit(nogil=True, error_model="numpy")
def _pair(codes, r, gap):
    x = convert(I, load(B, at(uint8, codes + 16 * (r >> 1)), 0)) >> 4 * (r & 1)
    top = convert(I, load(B, at(uint8, codes + gap + 16 * (r >> 2)), 0)) >> 2 * (r & 3)
    return convert(F, x & 3 | (top & 1) << 2), convert(F, x >> 2 & 3 | (top & 2) << 1)


@njit(nogil=True, error_model="numpy")
def _put(codes, r, gap, a, b):
    low, high = at(uint8, codes + 16 * (r >> 1)), at(uint8, codes + gap + 16 * (r >> 2))
    x, top = a & 3 | (b & 3) << 2, (a >> 2 | b >> 2 << 1) << 2 * (r & 3)
    if r & 1:
        x = x << 4 | convert(I, load(B, low, 0))
    if r & 3:
        top = top | convert(I, load(B, high, 0))
    store(low, 0, convert(B, x))
    store(high, 0, convert(B, top))


_add, _expand, _pack = add_rows_by(_pair), expand_rows_by(_pair), pack_rows_by(_put)


@worker
def add(task, codes, weights, out, ahead):
    _add(task, codes, weights, out, ahead)


@worker
def expand(task, codes, params, out, unused):
    _expand(task, codes, params, out)


@worker
def pack(task, values, params, codes, unused):
    _pack(task, values, params, codes)
