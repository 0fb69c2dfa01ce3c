"""A page's keys and values as floats, in scratch memory: for prefill, which shares them among many queries, and for inspection."""
from numba import float32, int64, njit, uint16

from edgeattn.kernels_cpu.floats import F
from edgeattn.kernels_cpu.page_pool import (BY_ROW, BY_TOKEN, GROUPS, K, K_AXIS, K_EXPAND, K_GAP, K_PARAMS, SEPARATED, V, V_BLOCK, V_EXPAND,
                                            V_GAP, V_PARAMS, V_QUANTISED, field_at, pool_of)
from edgeattn.kernels_cpu.page_rows import GAP, HALF, OUT_STRIDE, ROWS
from edgeattn.kernels_cpu.parallel import call_worker
from edgeattn.kernels_cpu.simd import at, fma, load, load_half, store
from edgeattn.page_formats import PAGE


@njit(nogil=True, error_model="numpy")
def _params(halves, count, to):
    """`count` halves as floats at address `to`; -> that address."""
    for i in range(0, count, 16):
        store(at(float32, to), i, load_half(F, at(uint16, halves), i))
    return to


@njit(nogil=True, error_model="numpy")
def expand_keys(pools, depth, task, entry, out, stride, half, params):
    """A page's keys as floats: channel c of the first 16 tokens at out + c * stride, of the others `half` floats further on.
    `task` and `params` are the addresses of scratch memory: a task of page_rows, and 2 * depth floats."""
    pool = pool_of(pools, entry)
    codes, halves = field_at(pool, K, entry), field_at(pool, K_PARAMS, entry)
    t = at(int64, task)
    t[ROWS], t[GAP], t[OUT_STRIDE], t[HALF] = depth, pool[K_GAP], stride, half
    by_row = _params(halves, 2 * depth, params) if pool[K_AXIS] == BY_ROW else 0
    call_worker(pool[K_EXPAND], task, codes, by_row, out, 0)
    if pool[K_AXIS] == BY_TOKEN:
        x, p = at(float32, out), at(uint16, halves)
        for c in range(depth):
            first = c // 32 * 64 if pool[GROUPS] > 1 else 0
            for i in range(2):
                low, step = load_half(F, p, first + 16 * i), load_half(F, p, first + 32 + 16 * i)
                store(x, c * stride + half * i, fma(load(F, x, c * stride + half * i), step, low))


@njit(nogil=True, error_model="numpy")
def expand_values(pools, width, task, entry, count, out, params):
    """The values of a page's first `count` tokens as floats [token][width]."""
    pool = pool_of(pools, entry)
    codes, halves = field_at(pool, V, entry), field_at(pool, V_PARAMS, entry)
    t = at(int64, task)
    count = PAGE if pool[V_QUANTISED] else count  # sealed pages are full
    t[ROWS], t[GAP], t[OUT_STRIDE], t[HALF] = count, pool[V_GAP], width, 16
    for block in range(width // 32):
        by_row = 0
        if pool[V_QUANTISED]:
            first = block * 64 if pool[GROUPS] > 1 else 0
            by_row = _params(halves + 2 * first, 64, params)
        call_worker(pool[V_EXPAND], task, codes + block * pool[V_BLOCK], by_row, out + 128 * block, 0)
        if pool[SEPARATED]:
            x, p = at(float32, out), at(uint16, halves)
            for i in range(count):
                for c in range(32 * block, 32 * block + 32, 16):
                    store(x, i * width + c, load(F, x, i * width + c) * load_half(F, p, 64 * pool[GROUPS] + c))
