"""KV type f32: how its rows are read and written (page_formats.py), and the workers made of that."""
from numba import float32, njit

from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_rows import add_rows_by, expand_rows_by
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.simd import at, load


@njit(nogil=True, error_model="numpy")
def _pair(values, r, gap):
    x = at(float32, values)
    return load(F, x, r * gap), load(F, x, r * gap + 16)


_add, _expand = add_rows_by(_pair), expand_rows_by(_pair)


@worker
def add(task, codes, weights, out, ahead):
    _add(task, codes, weights, out, ahead)


@worker
def expand(task, codes, params, out, unused):
    _expand(task, codes, params, out)
