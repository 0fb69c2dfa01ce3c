"""KV type int8: how its rows are read and written (page_formats.py), and the workers made of that."""
from numba import njit, uint8

from edgeattn.kernels_cpu.floats import F, I
from edgeattn.kernels_cpu.page_rows import add_rows_by, expand_rows_by, pack_rows_by
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, convert, load, store, u8

B = u8(16)


@njit(nogil=True, error_model="numpy")
def _pair(codes, r, gap):
    x = at(uint8, codes + 32 * r)
    return convert(F, convert(I, load(B, x, 0))), convert(F, convert(I, load(B, x, 16)))


@njit(nogil=True, error_model="numpy")
def _put(codes, r, gap, a, b):
    x = at(uint8, codes + 32 * r)
    store(x, 0, convert(B, a))
    store(x, 16, convert(B, b))


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
