"""KV type int4: how its quads of rows are read and written (page_formats.py), and the workers made of that."""
from numba import njit, uint8

from edgeattn.kernels_cpu.page_rows import QUAD, dot_rows_by, expand_quads_by, pack_quads_by
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, load, store


@njit(nogil=True, error_model="numpy")
def _quad(codes, g, gap):
    x = load(QUAD, at(uint8, codes + 64 * g), 0)
    return x & 15, x >> 4


@njit(nogil=True, error_model="numpy")
def _put(codes, g, gap, a, b):
    store(at(uint8, codes + 64 * g), 0, a | b << 4)


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
