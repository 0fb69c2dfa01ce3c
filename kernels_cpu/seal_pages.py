"""Whole pages of floats to quantised ones: parameters, then codes (page_formats.py)."""
import numpy as np
from numba import carray, cfunc, float32, int32, int64, njit, uint16, uint8

from edgeattn.kernels_cpu.floats import F, I, from_half, half_towards, sqrt, to_half, where_less
from edgeattn.kernels_cpu.page_expand import expand_keys
from edgeattn.kernels_cpu.page_pool import (BY_ROW, GROUPS, K, K_AXIS, K_BYTES, K_GAP, K_LEVELS, K_PACK, K_PARAMS, K_REFRESH, K_THRESHOLD,
                                            POOLS, SEPARATED, SYMMETRIC, V, V_BLOCK, V_BYTES, V_EXPAND, V_GAP, V_LEVELS, V_PACK, V_PARAMS,
                                            Pages, field_at, pool_of)
from edgeattn.kernels_cpu.page_rows import GAP, HALF, LEVELS, OUT_STRIDE, ROWS
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.simd import Vec, at, convert, hmax, load, splat, store, u8, vabs, vmax, vmin
from edgeattn.kernels_cpu.steps import STEP, as_f32, call
from edgeattn.page_formats import PAGE, PageFormat

ARGS = ("pools", "sources", "sources.rows", "targets", "head_dim", "workspace")
H, LINE = Vec("u16", 16), u8(64)
PLACE = 128  # bytes of a thread's scratch before its floats


def seal_pages(k, v, *, k_type, v_type, k_axis="channel", one_group=0, separated=0, threshold=0.0, gate=16, refresh=0.0):
    head_dim, count = k.shape[1], len(k)
    floats = Pages(PageFormat(head_dim, "f32", "f32"), count)
    codes = Pages(PageFormat(head_dim, k_type, v_type, k_axis, bool(one_group), bool(separated), threshold, gate, refresh), count)
    floats.k.view(np.float32)[:] = k.reshape(count, -1)
    floats.v.view(np.float32).reshape(count, PAGE, -1)[..., :head_dim] = v
    table = np.stack([floats.table_row(), codes.table_row()])
    run(table, head_dim, np.arange(count) * POOLS, np.arange(count) * POOLS + 1)
    return tuple(codes.arrays().values())


def run(table: np.ndarray, head_dim: int, sources: np.ndarray, targets: np.ndarray) -> None:
    """Quantise the pages of entries `sources` into those of `targets`; table: a row for each pool (page_pool.py)."""
    tensors = {"sources": np.ascontiguousarray(sources, np.int32), "targets": np.ascontiguousarray(targets, np.int32), "pools": table}
    call(step, ARGS, tensors, {"head_dim": head_dim}, None, workspace_bytes)


def workspace_bytes(tensors, attributes, rows, threads):
    return threads * _scratch(attributes["head_dim"])


def _scratch(head_dim):
    width = (head_dim + 31) // 32 * 32
    return PLACE + 4 * (2 * 32 * width + 4 * width + 64)


_scratch_bytes = njit(nogil=True, error_model="numpy")(_scratch)


@njit(nogil=True, error_model="numpy")
def _parameters(low, high, levels, halves, low_at, step_at, floats, float_low, float_step):
    """Minimum and step of 16 groups, as halves and as the floats they stand for."""
    bits = half_towards(low, False)
    low = from_half(convert(H, bits))
    store(halves, low_at, convert(H, bits))
    step = half_towards((high - low) / splat(F, np.float32(levels)), True)
    store(halves, step_at, convert(H, step))
    store(floats, float_low, low)
    store(floats, float_step, from_half(convert(H, step)))


@njit(nogil=True, error_model="numpy")
def _symmetric(largest, levels, halves, low_at, step_at, floats, float_low, float_step):
    half = np.float32((levels + 1) // 2)
    bits = half_towards(largest / splat(F, half - np.float32(1)), True)
    step = from_half(convert(H, bits))
    low = step * -half
    store(halves, low_at, to_half(low))
    store(halves, step_at, convert(H, bits))
    store(floats, float_low, low)
    store(floats, float_step, step)


@njit(nogil=True, error_model="numpy")
def _range_of_rows(x, first, lows, highs):
    """Minimum and maximum of 16 rows of 32."""
    for r in range(16):
        a, b = load(F, x, first + 32 * r), load(F, x, first + 32 * r + 16)
        lows[r], highs[r] = -hmax(vmax(a * np.float32(-1), b * np.float32(-1))), hmax(vmax(a, b))


@njit(nogil=True, error_model="numpy")
def _pack(worker_address, task, x, first, rows, gap, levels, params, codes):
    t = at(int64, task)
    t[ROWS], t[GAP], t[LEVELS] = rows, gap, levels
    call_worker(worker_address, task, x + 4 * first, params, codes, 0)


@njit(nogil=True, error_model="numpy")
def _keys_by_row(pool, task, x, depth, params, halves, codes, spare):
    lows, highs = at(float32, spare), at(float32, spare + 64)
    for r in range(0, depth, 16):
        _range_of_rows(at(float32, x), 32 * r, lows, highs)
        low, high = load(F, lows, 0), load(F, highs, 0)
        _parameters(low, high, pool[K_LEVELS], at(uint16, halves), r, depth + r, at(float32, params), r, depth + r)
    _pack(pool[K_PACK], task, x, 0, depth, pool[K_GAP], pool[K_LEVELS], params, codes)


@njit(nogil=True, error_model="numpy")
def _scale_columns(x, first, rows, params, at_low):
    """(x - minimum) / step of each column, so that rows can be packed with minimum 0 and step 1."""
    p = at(float32, params)
    for i in range(0, 32, 16):
        low, step = load(F, p, at_low + i), load(F, p, at_low + 32 + i)
        zero = splat(F, np.float32(0))
        inverse = where_less(zero, step, splat(F, np.float32(1)) / step, zero)
        for r in range(rows):
            store(x, first + 32 * r + i, (load(F, x, first + 32 * r + i) - low) * inverse)


@njit(nogil=True, error_model="numpy")
def _by_token(x, first, rows, one_group, levels, halves, params):
    """Parameters of the 32 columns of `rows` rows -> halves [2][32], params [2][32] floats."""
    for i in range(0, 32, 16):
        low = high = load(F, x, first + i)
        largest = vabs(low)
        for r in range(1, rows):
            y = load(F, x, first + 32 * r + i)
            low, high, largest = vmin(low, y), vmax(high, y), vmax(largest, vabs(y))
        if one_group:
            _symmetric(largest, levels, at(uint16, halves), i, 32 + i, at(float32, params), i, 32 + i)
        else:
            _parameters(low, high, levels, at(uint16, halves), i, 32 + i, at(float32, params), i, 32 + i)


@njit(nogil=True, error_model="numpy")
def _keys_by_token(pool, task, x, depth, params, halves, codes):
    size = depth if pool[GROUPS] == 1 else 32
    for d in range(0, depth, size):
        rows = min(size, depth - d)
        _by_token(at(float32, x), 32 * d, rows, pool[SYMMETRIC], pool[K_LEVELS], halves + 2 * (d // size * 64), params)
        _scale_columns(at(float32, x), 32 * d, rows, params, 0)
    p = at(float32, params)
    for i in range(depth):
        p[i], p[depth + i] = 0, 1
    _pack(pool[K_PACK], task, x, 0, depth, pool[K_GAP], pool[K_LEVELS], params, codes)


@njit(nogil=True, error_model="numpy")
def _separate(x, halves):
    """Divide each of a block's 32 columns by the root of its largest value, a half that is kept (ZipCache)."""
    scales = at(uint16, halves)
    for i in range(0, 32, 16):
        largest = vabs(load(F, x, i))
        for r in range(1, 32):
            largest = vmax(largest, vabs(load(F, x, 32 * r + i)))
        bits = convert(I, to_half(sqrt(largest)))
        bits = where_less(bits, splat(I, np.int32(1)), splat(I, np.int32(0x3C00)), bits)  # 1 where all is 0
        store(scales, i, convert(H, bits))
        for r in range(32):
            store(x, 32 * r + i, load(F, x, 32 * r + i) / from_half(convert(H, bits)))


@njit(nogil=True, error_model="numpy")
def _values(pool, task, x, blocks, params, halves, codes, spare):
    """x: [block][32 tokens][32 channels] floats."""
    p, lows, highs = at(float32, params), at(float32, spare), at(float32, spare + 64)
    for b in range(blocks):
        if pool[SEPARATED]:
            _separate(at(float32, x + 4096 * b), halves + 2 * (64 * pool[GROUPS] + 32 * b))
    for b in range(blocks):
        group = b if pool[GROUPS] > 1 else 0
        for t in range(0, 32, 16):
            if pool[SYMMETRIC] and b == 0:
                for r in range(16):
                    top = np.float32(0)
                    for other in range(blocks):
                        first = 1024 * other + 32 * (t + r)
                        top = max(top, hmax(vmax(vabs(load(F, at(float32, x), first)), vabs(load(F, at(float32, x), first + 16)))))
                    highs[r] = top
                _symmetric(load(F, highs, 0), pool[V_LEVELS], at(uint16, halves), t, 32 + t, p, t, 32 + t)
            elif not pool[SYMMETRIC]:
                _range_of_rows(at(float32, x), 1024 * b + 32 * t, lows, highs)
                _parameters(load(F, lows, 0), load(F, highs, 0), pool[V_LEVELS], at(uint16, halves), 64 * group + t, 64 * group + 32 + t,
                            p, t, 32 + t)
        _pack(pool[V_PACK], task, x, 1024 * b, 32, pool[V_GAP], pool[V_LEVELS], params, codes + b * pool[V_BLOCK])


@njit(nogil=True, error_model="numpy")
def _copy(source, target, size):
    """A side that stays floats."""
    a, b = at(uint8, source), at(uint8, target)
    for i in range(0, size, 64):
        store(b, i, load(LINE, a, i))


@worker
def seal_page(a, rows, first, i, thread):
    source, target, depth = np.int64(at(int32, a[1])[i]), np.int64(at(int32, a[3])[i]), a[4]
    width = (depth + 31) // 32 * 32
    task = a[5] + thread * _scratch_bytes(depth)
    x = task + PLACE
    params, spare = x + 4 * 32 * width, x + 4 * 32 * width + 16 * width
    pool, floats = pool_of(a[0], target), pool_of(a[0], source)
    expand_keys(a[0], depth, task, source, x, 32, 16, params)
    keys, codes = field_at(pool, K_PARAMS, target), field_at(pool, K, target)
    if pool[K_LEVELS] == 0 and pool[K_PACK]:
        p = at(float32, params)
        p[0], p[1] = as_f32(pool[K_THRESHOLD]), as_f32(pool[K_REFRESH])
        _pack(pool[K_PACK], task, x, 0, depth, pool[K_GAP], 0, params, codes)
    elif pool[K_LEVELS] == 0:
        _copy(field_at(floats, K, source), codes, pool[K_BYTES])
    elif pool[K_AXIS] == BY_ROW:
        _keys_by_row(pool, task, x, depth, params, keys, codes, spare)
    else:
        _keys_by_token(pool, task, x, depth, params, keys, codes)
    if pool[V_LEVELS] == 0:
        _copy(field_at(floats, V, source), field_at(pool, V, target), pool[V_BYTES])
        return
    t = at(int64, task)
    for b in range(width // 32):
        t[ROWS], t[GAP], t[OUT_STRIDE], t[HALF] = 32, floats[V_GAP], 32, 16
        call_worker(floats[V_EXPAND], task, field_at(floats, V, source) + b * floats[V_BLOCK], 0, x + 4096 * b, 0)
    _values(pool, task, x, width // 32, params, field_at(pool, V_PARAMS, target), field_at(pool, V, target), spare)


@cfunc(STEP, cache=True)
def step(a, state):
    count = state[a[2]]
    if count > 1:
        parallel(seal_page(), carray(a, 1).ctypes.data, 0, 0, count)
    elif count:
        call_worker(seal_page(), carray(a, 1).ctypes.data, 0, 0, 0, 0)
