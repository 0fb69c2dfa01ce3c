"""Rotary embedding of q and k (arXiv 2104.09864), and the new keys and values into their pages."""
import numpy as np
from numba import float32, int64, njit, uint16

from edgeattn.kernels_cpu.attention_call import (COS, COS_STRIDE, HEAD_DIM, INTERLEAVED, K, K_STRIDE, KEYS_ROTATED, KEYS_ROTATION, KV_HEADS,
                                                 NUM_HEADS, PAGE, POOLS, POSITIONS, Q, Q_STRIDE, ROTARY_DIM, ROTATED, SCALE, SEQUENCES,
                                                 SIN, TOKENS, V, V_STRIDE, WIDTH, entry_of, rows_of, slots_of)
from edgeattn.kernels_cpu.floats import F, load_float, scatter_float, store_float
from edgeattn.kernels_cpu.hadamard import hadamard
from edgeattn.kernels_cpu.page_pool import K as K_CODES, K_BYTES, V as V_CODES, field_at, pool_of
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.simd import at, fma, load, splat, store
from edgeattn.kernels_cpu.steps import as_f32

SERIAL = 1 << 16  # fewer elements are not worth a parallel region


@njit(nogil=True, error_model="numpy")
def rotate_head(x, at, cos, sin, angle, half, interleaved, head_dim, scale, out, to):
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
def _store_token(k_pool, v_pool, offset, depth, width, k, k_from, v, v_from):
    """Keys become a column of the page, values a row."""
    for d in range(0, depth, 16):
        scatter_float(k_pool, d * PAGE + offset, PAGE, load_float(k, k_from + d))
        store_float(v_pool, offset * width + d, load_float(v, v_from + d))


@njit(nogil=True, error_model="numpy")
def _sequence_of(call, row):
    s = np.int64(0)
    while s + 1 < call[SEQUENCES] and rows_of(call, s + 1)[0] <= row:
        s += 1
    return s


@njit(nogil=True, error_model="numpy")
def rotate_queries(call, row, as_keys):
    """A token's q, rotated, times the softmax scale; with `as_keys` also by the matrix that the cache's keys were rotated by."""
    q, rotated, depth, half = at(float32, call[Q]), at(float32, call[ROTATED]), call[HEAD_DIM], call[ROTARY_DIM] // 2
    cos, sin, angle = at(float32, call[COS]), at(float32, call[SIN]), at(int64, call[POSITIONS])[row] * call[COS_STRIDE]
    for head in range(call[NUM_HEADS]):
        to = (row * call[NUM_HEADS] + head) * depth
        rotate_head(q, row * call[Q_STRIDE] + head * depth, cos, sin, angle, half, call[INTERLEAVED], depth,
                    as_f32(call[SCALE]), rotated, to)
        if as_keys:
            hadamard(rotated, to, depth)


@worker
def write_token(call, tokens, first, row, thread):
    k, v, rotated_k = at(float32, call[K]), at(float32, call[V]), at(float32, call[KEYS_ROTATED])
    cos, sin, half, depth = at(float32, call[COS]), at(float32, call[SIN]), call[ROTARY_DIM] // 2, call[HEAD_DIM]
    angle = at(int64, call[POSITIONS])[row] * call[COS_STRIDE]
    rotate_queries(call, row, call[KEYS_ROTATION])
    s = _sequence_of(call, row)
    start, rows = rows_of(call, s)
    for head in range(call[KV_HEADS]):
        to = (row * call[KV_HEADS] + head) * depth
        rotate_head(k, row * call[K_STRIDE] + head * depth, cos, sin, angle, half, call[INTERLEAVED], depth, np.float32(1), rotated_k, to)
        if call[KEYS_ROTATION]:
            hadamard(rotated_k, to, depth)
        slot = slots_of(call, s, head) - rows + row - start
        entry = entry_of(call, s, head, slot // PAGE)
        pool = pool_of(call[POOLS], entry)
        keys, values, v_from = field_at(pool, K_CODES, entry), field_at(pool, V_CODES, entry), row * call[V_STRIDE] + head * depth
        if pool[K_BYTES] == 2 * PAGE * depth:  # halves
            _store_token(at(uint16, keys), at(uint16, values), slot % PAGE, depth, call[WIDTH], rotated_k, to, v, v_from)
        else:
            _store_token(at(float32, keys), at(float32, values), slot % PAGE, depth, call[WIDTH], rotated_k, to, v, v_from)


@njit(nogil=True, error_model="numpy")
def write_tokens(call, address):
    """Rotated q times the softmax scale to the workspace; rotated k, and v, to the pages. `address` is the call's."""
    tokens = call[TOKENS]
    if tokens > 1 and tokens * (call[NUM_HEADS] + 2 * call[KV_HEADS]) * call[HEAD_DIM] > SERIAL:
        parallel(write_token(), address, tokens, 0, tokens)
    else:
        for row in range(tokens):
            call_worker(write_token(), address, tokens, 0, row, 0)
