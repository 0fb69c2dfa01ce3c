"""Rotary embedding of q and k (arXiv 2104.09864), and the new keys and values into their pages."""
import numpy as np
from numba import float32, int32, int64, njit, uint16

from edgeattn.kernels_cpu.attention_call import (CACHE_TYPE, COS, COS_STRIDE, HEAD_DIM, INTERLEAVED, K, K_POOL, K_STRIDE, KEYS_ROTATED,
                                                 KV_HEADS, NUM_HEADS, PAGE_SIZE, POSITIONS, Q, Q_STRIDE, ROTARY_DIM, ROTATED, SCALE,
                                                 SIN, SLOTS, TOKENS, V, V_POOL, V_STRIDE)
from edgeattn.kernels_cpu.floats import F, load_float, scatter_float, store_float
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.simd import at, fma, load, splat, store
from edgeattn.kernels_cpu.steps import as_f32

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
    depth, size = call[HEAD_DIM], call[PAGE_SIZE]
    slot = np.int64(at(int32, call[SLOTS])[row])
    page, offset = slot // size, slot % size
    for head in range(call[KV_HEADS]):
        base, source = (page * call[KV_HEADS] + head) * depth * size, (row * call[KV_HEADS] + head) * depth
        for d in range(0, depth, 16):
            scatter_float(k_pool, base + d * size + offset, size, load_float(rotated_k, source + d))
            store_float(v_pool, base + offset * depth + d, load_float(v, row * call[V_STRIDE] + head * depth + d))


@worker
def write_token(call, tokens, first, row, thread):
    q, k, v = at(float32, call[Q]), at(float32, call[K]), at(float32, call[V])
    cos, sin, half, depth = at(float32, call[COS]), at(float32, call[SIN]), call[ROTARY_DIM] // 2, call[HEAD_DIM]
    rotated_q, rotated_k = at(float32, call[ROTATED]), at(float32, call[KEYS_ROTATED])
    angle = at(int64, call[POSITIONS])[row] * call[COS_STRIDE]
    for head in range(call[NUM_HEADS]):
        _rotate(q, row * call[Q_STRIDE] + head * depth, cos, sin, angle, half, call[INTERLEAVED], depth, as_f32(call[SCALE]),
                rotated_q, (row * call[NUM_HEADS] + head) * depth)
    for head in range(call[KV_HEADS]):
        _rotate(k, row * call[K_STRIDE] + head * depth, cos, sin, angle, half, call[INTERLEAVED], depth, np.float32(1),
                rotated_k, (row * call[KV_HEADS] + head) * depth)
    if call[CACHE_TYPE]:
        _store_token(call, row, rotated_k, v, at(uint16, call[K_POOL]), at(uint16, call[V_POOL]))
    else:
        _store_token(call, row, rotated_k, v, at(float32, call[K_POOL]), at(float32, call[V_POOL]))


@njit(nogil=True, error_model="numpy")
def write_tokens(call, address):
    """Rotated q times the softmax scale to the workspace; rotated k, and v, to the pools. `address` is the call's."""
    tokens = call[TOKENS]
    if tokens > 1 and tokens * (call[NUM_HEADS] + 2 * call[KV_HEADS]) * call[HEAD_DIM] > SERIAL:
        parallel(write_token(), address, tokens, 0, tokens)
    else:
        for row in range(tokens):
            call_worker(write_token(), address, tokens, 0, row, 0)
