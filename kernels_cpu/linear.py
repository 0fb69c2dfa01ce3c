"""x times a float32 or float16 weight [N, K], transposed, plus bias.

Up to 4 tokens: every thread walks several rows of the weight at once, each a sequential stream, at memory bandwidth. More: a
strip of BLOCK outputs is transposed to float32, DEPTH of K at a time, into a scratch that stays in L1; all tokens sweep over it.
"""
import numpy as np
from numba import cfunc, njit, prange

from edgeattn.kernels_cpu.floats import (BLOCK, COLUMNS, F, ROWS, TILE, add_tile, fetch_add, load_block, load_end, load_floats,
                                         outer_add, outer_product, transpose)
from edgeattn.kernels_cpu.simd import hsum, load_tile, prefetch, store, store_tile, zeros
from edgeattn.kernels_cpu.steps import STEP, aligned, call, f32_at, i64_at, thread_count, u16_at

ARGS = ("x", "x.rows", "x.stride", "weight", "weight.type", "weight.0", "weight.1", "weight.stride", "bias", "out", "out.stride",
        "workspace")
FEW = 4                         # tokens of one pass over the weight by streams
DEPTH = 256                     # of K in one slice: float32 sums stay short, which keeps them accurate
EDGE = max(256, ROWS * BLOCK)   # floats of a thread's scratch for ragged tiles
SERIAL = 1 << 16                # products that are not worth a parallel region
AHEAD = 2048                    # bytes prefetched ahead in each stream


def linear(x, weight, bias=None):
    out = aligned((x.shape[0], weight.shape[0]), np.float32)
    call(step, ARGS, dict(x=x, weight=weight, bias=bias, out=out), workspace_bytes=workspace_bytes)
    return out


def workspace_bytes(tensors, attributes, rows, threads):
    """Counters, bias padded to strips, tokens packed in tiles, and for each thread a strip and an edge tile."""
    n, k = tensors["weight"].shape
    padded = -(-max(rows, FEW) // ROWS) * ROWS
    return 4 * (16 + -(-n // BLOCK) * BLOCK + padded * k + threads * (DEPTH * BLOCK + EDGE))


# ---- few tokens -------------------------------------------------------------------------------------------------
def _dot_kernel(tokens, streams):
    """Dots of `tokens` rows of x with the weight's rows i, i + apart, i + 2 * apart ..."""
    count = tokens * streams

    @njit(nogil=True, error_model="numpy")
    def dots(valid, x, x_stride, w, w_stride, depth, bias, out, out_stride, i, apart):
        acc, at, gap, ahead = zeros(F, count), i * w_stride, apart * w_stride, AHEAD // w.itemsize
        for k in range(0, depth - 31, 32):
            acc = outer_product(acc, load_tile(F, tokens, x, k, x_stride), load_floats(streams, w, at + k, gap))
            acc = outer_product(acc, load_tile(F, tokens, x, k + 16, x_stride), load_floats(streams, w, at + k + 16, gap))
            for s in range(streams):
                prefetch(w, at + s * gap + k + ahead)
                if w.itemsize == 4:
                    prefetch(w, at + s * gap + k + ahead + 16)
        for t in range(valid):
            for s in range(streams):
                total = hsum(acc[t * streams + s])
                for k in range(depth // 32 * 32, depth, 16):
                    rest = min(16, depth - k)
                    total += hsum(load_end(x, t * x_stride + k, rest) * load_end(w, at + s * gap + k, rest))
                out[t * out_stride + i + s * apart] = total + bias[i + s * apart]
    return dots


_one_token, _few_tokens = _dot_kernel(1, 4), _dot_kernel(FEW, 2)


@njit(nogil=True, error_model="numpy")
def _dots(tokens, x, x_stride, w, w_stride, depth, bias, out, out_stride, i, apart):
    if tokens == 1:
        _one_token(1, x, x_stride, w, w_stride, depth, bias, out, out_stride, i, apart)
    else:
        _few_tokens(tokens, x, x_stride, w, w_stride, depth, bias, out, out_stride, i, apart)


@njit(parallel=True, nogil=True, error_model="numpy")
def _dots_parallel(tokens, x, x_stride, w, w_stride, depth, bias, out, out_stride, apart):
    for i in prange(apart):
        _dots(tokens, x, x_stride, w, w_stride, depth, bias, out, out_stride, i, apart)


@njit(nogil=True, error_model="numpy")
def _by_streams(tokens, x, x_stride, w, w_stride, n, depth, bias, out, out_stride, packed):
    if tokens > 1:  # FEW rows are read, so they must exist
        for t in range(tokens):
            for k in range(depth):
                packed[t * depth + k] = x[t * x_stride + k]
        x, x_stride = packed, depth
    streams = 4 if tokens == 1 else 2
    apart = n // streams
    if n * depth > SERIAL:
        _dots_parallel(tokens, x, x_stride, w, w_stride, depth, bias, out, out_stride, apart)
    else:
        for i in range(apart):
            _dots(tokens, x, x_stride, w, w_stride, depth, bias, out, out_stride, i, apart)
    for i in range(apart * streams, n):  # the rest: all streams on one row
        _dots(tokens, x, x_stride, w, w_stride, depth, bias, out, out_stride, i, 0)


# ---- many tokens ------------------------------------------------------------------------------------------------
@njit(nogil=True, error_model="numpy")
def _pack_rows(x, x_stride, tokens, depth, block, padded, packed):
    """Tokens of one tile as [slice][k][ROWS], slices of all tiles together."""
    for first in range(0, depth, DEPTH):
        size = min(DEPTH, depth - first)
        to = first * padded + block * ROWS * size
        for r in range(ROWS):
            row = block * ROWS + r
            for k in range(size):
                packed[to + k * ROWS + r] = x[row * x_stride + first + k] if row < tokens else np.float32(0)


@njit(nogil=True, error_model="numpy")
def _transpose_corner(w, w_stride, at, rows, size, edge, strip, to):
    """16 x 16 or fewer elements by way of `edge`, which is filled up with zeros."""
    for r in range(16):
        store(edge, r * 16, load_end(w, at + r * w_stride, size if r < rows else 0))
    tile = transpose(load_tile(F, 16, edge, 0, 16))
    for k in range(size):
        store(strip, to + k * BLOCK, tile[k])


@njit(nogil=True, error_model="numpy")
def _transpose_strip(w, w_stride, n, start, first, size, edge, strip):
    """BLOCK rows of the weight from `start`, K from `first` on, as strip[k][BLOCK]."""
    for c in range(COLUMNS):
        row = start + 16 * c
        for k in range(0, size, 16):
            at, to = row * w_stride + first + k, k * BLOCK + 16 * c
            if row + 16 <= n and k + 16 <= size:
                store_tile(strip, to, BLOCK, 16, 1, transpose(load_floats(16, w, at, w_stride)))
            else:
                _transpose_corner(w, w_stride, at, max(0, min(16, n - row)), min(16, size - k), edge, strip, to)


@njit(nogil=True, error_model="numpy")
def _tile(strip, packed, at, size, start, start_at, start_stride, target, to, stride):
    """target = start + packed tokens times the strip: ROWS x BLOCK."""
    acc = zeros(F, TILE)
    for k in range(size):
        acc = outer_add(acc, load_tile(F, COLUMNS, strip, k * BLOCK, 16), packed, at + k * ROWS)
    store_tile(target, to, stride, 16, COLUMNS, add_tile(acc, load_block(ROWS, COLUMNS, start, start_at, start_stride)))


@njit(nogil=True, error_model="numpy")
def _sweep(strip, packed, tokens, padded, first, size, n, column, bias, out, out_stride, edge):
    """Add one slice of K to BLOCK columns of `out`, for all tokens; ragged tiles by way of `edge`."""
    for block in range(padded // ROWS):
        at, to = first * padded + block * ROWS * size, block * ROWS * out_stride + column
        rows, width = min(ROWS, tokens - block * ROWS), min(BLOCK, n - column)
        if rows == ROWS and width == BLOCK:
            if first == 0:
                _tile(strip, packed, at, size, bias, column, 0, out, to, out_stride)
            else:
                _tile(strip, packed, at, size, out, to, out_stride, out, to, out_stride)
            continue
        for r in range(rows):
            for c in range(width):
                edge[r * BLOCK + c] = out[to + r * out_stride + c] if first else bias[column + c]
        _tile(strip, packed, at, size, edge, 0, BLOCK, edge, 0, BLOCK)
        for r in range(rows):
            for c in range(width):
                out[to + r * out_stride + c] = edge[r * BLOCK + c]


@njit(nogil=True, error_model="numpy")
def _strips(x_packed, tokens, padded, w, w_stride, n, depth, bias, out, out_stride, begin, end, scratch):
    """Strips begin ... end of the outputs, slice by slice: the slice of x stays in L2."""
    strip, edge = scratch[:DEPTH * BLOCK], scratch[DEPTH * BLOCK:]
    for first in range(0, depth, DEPTH):
        size = min(DEPTH, depth - first)
        for i in range(begin, end):
            _transpose_strip(w, w_stride, n, i * BLOCK, first, size, edge, strip)
            _sweep(strip, x_packed, tokens, padded, first, size, n, i * BLOCK, bias, out, out_stride, edge)


@njit(parallel=True, nogil=True, error_model="numpy")
def _by_strips(tokens, x, x_stride, w, w_stride, n, depth, bias, out, out_stride, packed, scratch, counter):
    threads, strips, padded = thread_count(), (n + BLOCK - 1) // BLOCK, (tokens + ROWS - 1) // ROWS * ROWS
    group = max(1, min(8, strips // (4 * threads)))
    for block in prange(padded // ROWS):
        _pack_rows(x, x_stride, tokens, depth, block, padded, packed)
    counter[0] = 0
    for t in prange(threads):
        begin = fetch_add(counter, 0, group)
        while begin < strips:
            _strips(packed, tokens, padded, w, w_stride, n, depth, bias, out, out_stride, begin, min(begin + group, strips),
                    scratch[t * (DEPTH * BLOCK + EDGE):(t + 1) * (DEPTH * BLOCK + EDGE)])
            begin = fetch_add(counter, 0, group)


# ---- the step ---------------------------------------------------------------------------------------------------
@njit(nogil=True, error_model="numpy")
def _linear(tokens, x, x_stride, w, w_stride, n, depth, bias_address, out, out_stride, workspace):
    threads, wide = thread_count(), (n + BLOCK - 1) // BLOCK * BLOCK
    padded = (max(tokens, FEW) + ROWS - 1) // ROWS * ROWS
    bias, packed = f32_at(workspace + 64, wide), f32_at(workspace + 64 + 4 * wide, padded * depth)
    given = f32_at(bias_address, n)
    for i in range(wide):
        bias[i] = given[i] if bias_address and i < n else np.float32(0)
    scratch = f32_at(workspace + 64 + 4 * (wide + padded * depth), threads * (DEPTH * BLOCK + EDGE))
    if tokens > FEW:
        _by_strips(tokens, x, x_stride, w, w_stride, n, depth, bias, out, out_stride, packed, scratch, i64_at(workspace, 1))
    elif tokens:
        _by_streams(tokens, x, x_stride, w, w_stride, n, depth, bias, out, out_stride, packed)


@cfunc(STEP, cache=True)
def step(a, state):
    tokens, x_stride, n, depth, w_stride, out_stride = state[a[1]], a[2], a[5], a[6], a[7], a[10]
    x, out = f32_at(a[0], tokens * x_stride), f32_at(a[9], tokens * out_stride)
    if a[4]:
        _linear(tokens, x, x_stride, u16_at(a[3], n * w_stride), w_stride, n, depth, a[8], out, out_stride, a[11])
    else:
        _linear(tokens, x, x_stride, f32_at(a[3], n * w_stride), w_stride, n, depth, a[8], out, out_stride, a[11])
