"""Rotary embedding of q and k (arXiv 2104.09864), and the new keys and values into their pages."""
import numpy as np
from numba import njit, prange

from edgeattn.kernels_cpu.floats import F, load_float, scatter_float, store_float
from edgeattn.kernels_cpu.simd import fma, load, splat, store
from edgeattn.kernels_cpu.steps import f32_at, i32_at, i64_at, u16_at

SERIAL = 1 << 16  # fewer elements are not worth a parallel region


@njit(nogil=True, error_model="numpy")
def _rotate(x, at, cos, sin, angle, half, interleaved, head_dim, scale, out, to):
    """One head: out = scale * rotated x. Channels behind 2 * half are only scaled."""
    done, factor = 0, splat(F, scale)
    if not interleaved:
        for i in range(0, half - 15, 16):
            a, b, c, s = load(F, x, at + i), load(F, x, at + half + i), load(F, cos, angle + i), load(F, sin, angle + i)
            store(out, to + i, (a * c - b * s) * factor)
            store(out, to + half + i, fma(b, c, a * s) * factor)
            done = i + 16
    for i in range(done, half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, half + i)
        a, b, c, s = x[at + first], x[at + second], cos[angle + i], sin[angle + i]
        out[to + first], out[to + second] = (a * c - b * s) * scale, (b * c + a * s) * scale
    for i in range(2 * half, head_dim):
        out[to + i] = x[at + i] * scale


@njit(nogil=True, error_model="numpy")
def _store_token(call, row, rotated_k, v, k_pool, v_pool):
    """Keys become a column of each page, values a row."""
    depth, size = call.head_dim, call.cache_page_size
    slot = np.int64(i32_at(call.batch_slots, 1)[row])
    page, offset = slot // size, slot % size
    for head in range(call.kv_heads):
        base, source = (page * call.kv_heads + head) * depth * size, (row * call.kv_heads + head) * depth
        for d in range(0, depth, 16):
            scatter_float(k_pool, base + d * size + offset, size, load_float(rotated_k, source + d))
            store_float(v_pool, base + offset * depth + d, load_float(v, row * call.v_stride + head * depth + d))


@njit(nogil=True, error_model="numpy")
def _write_row(call, row):
    q, k, v = f32_at(call.q, 1), f32_at(call.k, 1), f32_at(call.v, 1)
    cos, sin, half, depth = f32_at(call.cos, 1), f32_at(call.sin, 1), call.rotary_dim // 2, call.head_dim
    rotated_q, rotated_k = f32_at(call.rotated, 1), f32_at(call.keys, 1)
    angle = i64_at(call.batch_positions, 1)[row] * call.cos_stride
    for head in range(call.num_heads):
        _rotate(q, row * call.q_stride + head * depth, cos, sin, angle, half, call.interleaved, depth, call.scale,
                rotated_q, (row * call.num_heads + head) * depth)
    for head in range(call.kv_heads):
        _rotate(k, row * call.k_stride + head * depth, cos, sin, angle, half, call.interleaved, depth, np.float32(1),
                rotated_k, (row * call.kv_heads + head) * depth)
    if call.cache_type:
        _store_token(call, row, rotated_k, v, u16_at(call.cache_k, 1), u16_at(call.cache_v, 1))
    else:
        _store_token(call, row, rotated_k, v, f32_at(call.cache_k, 1), f32_at(call.cache_v, 1))


@njit(parallel=True, nogil=True, error_model="numpy")
def _parallel(call, tokens):
    for row in prange(tokens):
        _write_row(call, row)


@njit(nogil=True, error_model="numpy")
def write_tokens(call):
    """Rotated q times the softmax scale to the workspace; rotated k, and v, to the pools."""
    if call.tokens * (call.num_heads + 2 * call.kv_heads) * call.head_dim > SERIAL and call.tokens > 1:
        _parallel(call, call.tokens)
    else:
        for row in range(call.tokens):
            _write_row(call, row)
