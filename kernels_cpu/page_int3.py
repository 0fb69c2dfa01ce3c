"""KV type int3: how its quads of rows are read and written (page_formats.py), and the workers made of that."""
from numba import njit, uint8

from edgeattn.kernels_cpu.page_rows import QUAD, dot_rows_by, expand_quads_by, pack_quads_by
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, load, store


@njit(nogil=True, error_model="numpy")
def _quad(codes, g, gap):
    x = load(QUAD, at(uint8, codes + 64 * (g >> 1)), 0) >> 4 * (g & 1)
    top = load(QUAD, at(uint8, codes + gap + 64 * (g >> 2)), 0) >> 2 * (g & 3)
    return x & 3 | (top & 1) << 2, x >> 2 & 3 | (top & 2) << 1


@njit(nogil=True, error_model="numpy")
def _put(codes, g, gap, a, b):
    low, high = at(uint8, codes + 64 * (g >> 1)), at(uint8, codes + gap + 64 * (g >> 2))
    x, top = a & 3 | (b & 3) << 2, (a >> 2 | b >> 2 << 1) << 2 * (g & 3)
    if g & 1:
        x = x << 4 | load(QUAD, low, 0)
    if g & 3:
        top = top | load(QUAD, high, 0)
    store(low, 0, x)
    store(high, 0, top)


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
