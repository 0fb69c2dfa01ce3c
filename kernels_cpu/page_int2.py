"""KV type int2: how its quads of rows are read and written (page_formats.py), and the workers made of that."""
from numba import njit, uint8

from edgeattn.kernels_cpu.page_rows import QUAD, dot_rows_by, expand_quads_by, pack_quads_by
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, load, store


@njit(nogil=True, error_model="numpy")
def _quad(codes, g, gap):
    x = load(QUAD, at(uint8, codes + 64 * (g >> 1)), 0) >> 4 * (g & 1)
    return x & 3, x >> 2 & 3


@njit(nogil=True, error_model="numpy")
def _put(codes, g, gap, a, b):
    place, x = at(uint8, codes + 64 * (g >> 1)), a | b << 2
    if g & 1:
        x = x << 4 | load(QUAD, place, 0)
    store(place, 0, x)


_add, _expand, _pack = dot_rows_by(_quad), expand_quads_by(_quad), pack_quads_by(_put)


@worker
def add(task, codes, weights, out, ahead):
    _add(task, codes, weights, out, ahead)


@worker
def expand(task, codes, params, out, unused):
    _expand(task, codes, params, out)


@worker
def pack(task, values, params, codes, unused):
    _pack(task, values, params, codes)
