"""x times a float32 or float16 weight [N, K], transposed, plus bias.

Up to 4 tokens: every thread walks several rows of the weight at once, each a sequential stream, at memory bandwidth. More: a
strip of BLOCK outputs is transposed to float32, SLICE of K at a time, into a scratch that stays in L1; all tokens sweep over it.
"""
import numpy as np
from numba import carray, cfunc, float32, int64, njit, uint16

from edgeattn.kernels_cpu.float_tiles import (BLOCK, COLUMNS, ROWS, TILE, add_tile, load_floats, outer_product,
                                                transpose)
from edgeattn.kernels_cpu.floats import F, fetch_add, is_half, load_end
from edgeattn.kernels_cpu.parallel import call_worker, parallel, variant, worker
from edgeattn.kernels_cpu.simd import at, hsum, load_rows, load_tile, outer_add, prefetch, store, store_tile, zeros
from edgeattn.kernels_cpu.steps import STEP, aligned, call, thread_count

ARGS = ("x", "x.rows", "x.stride", "weight", "weight.type", "weight.0", "weight.1", "weight.stride", "bias", "out", "out.stride",
        "workspace")
X, TOKENS, X_STRIDE, W, W_TYPE, N, DEPTH, W_STRIDE, BIAS, OUT, OUT_STRIDE, WORKSPACE = range(len(ARGS))
FEW = 4                         # tokens of one pass over the weight by streams
STREAMS, FEW_STREAMS = 4, 4 if COLUMNS == 2 else 1  # rows read at once for one token and for FEW: sums in registers
SLICE = 256                     # of K at a time: float32 sums stay short, which keeps them accurate
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
    return 4 * (16 + -(-n // BLOCK) * BLOCK + padded * k + threads * (SLICE * BLOCK + EDGE))


# ---- few tokens -------------------------------------------------------------------------------------------------
def _dot_kernel(tokens, streams):
    """Dots of `tokens` rows of x with the weight's rows i, i + apart, i + 2 * apart ..."""
    count = tokens * streams

    @variant(tokens, streams)
    def dots(valid, x, x_stride, w, w_stride, depth, bias, out, out_stride, i, apart):
        acc, start, gap = zeros(F, count), i * w_stride, apart * w_stride
        ahead = AHEAD // 2 if is_half(w) else AHEAD // 4
        for k in range(0, depth - 31, 32):
            acc = outer_product(acc, load_tile(F, tokens, x, k, x_stride), load_floats(streams, w, start + k, gap))
            acc = outer_product(acc, load_tile(F, tokens, x, k + 16, x_stride), load_floats(streams, w, start + k + 16, gap))
            for s in range(streams):
                prefetch(w, start + s * gap + k + ahead)
                if not is_half(w):
                    prefetch(w, start + s * gap + k + ahead + 16)
        for t in range(valid):
            for s in range(streams):
                total = hsum(acc[t * streams + s])
                for k in range(depth // 32 * 32, depth, 16):
                    rest = min(16, depth - k)
                    total += hsum(load_end(x, t * x_stride + k, rest) * load_end(w, start + s * gap + k, rest))
                out[t * out_stride + i + s * apart] = total + bias[i + s * apart]
    return dots


_one_token, _few_tokens = _dot_kernel(1, STREAMS), _dot_kernel(FEW, FEW_STREAMS)


@njit(nogil=True, error_model="numpy")
def _places(a, tokens):
    """In the workspace: bias filled up to whole strips, packed tokens, and the address of the threads' scratch."""
    wide, padded = (a[N] + BLOCK - 1) // BLOCK * BLOCK, (max(tokens, FEW) + ROWS - 1) // ROWS * ROWS
    bias = a[WORKSPACE] + 64
    return at(float32, bias), at(float32, bias + 4 * wide), bias + 4 * (wide + padded * a[DEPTH])


@worker
def dot_rows(a, tokens, apart, i, thread):
    """Outputs i, i + apart ... of up to FEW tokens. More than one token: their copy in the workspace, as FEW rows are read."""
    depth, stride = a[DEPTH], a[W_STRIDE]
    bias, packed, _ = _places(a, tokens)
    x, x_stride, out = at(float32, a[X]), a[X_STRIDE], at(float32, a[OUT])
    if tokens > 1:
        x, x_stride = packed, depth
    if tokens == 1 and a[W_TYPE]:
        _one_token(1, x, x_stride, at(uint16, a[W]), stride, depth, bias, out, a[OUT_STRIDE], i, apart)
    elif tokens == 1:
        _one_token(1, x, x_stride, at(float32, a[W]), stride, depth, bias, out, a[OUT_STRIDE], i, apart)
    elif a[W_TYPE]:
        _few_tokens(tokens, x, x_stride, at(uint16, a[W]), stride, depth, bias, out, a[OUT_STRIDE], i, apart)
    else:
        _few_tokens(tokens, x, x_stride, at(float32, a[W]), stride, depth, bias, out, a[OUT_STRIDE], i, apart)


@njit(nogil=True, error_model="numpy")
def _by_streams(a, address, tokens):
    x, depth = at(float32, a[X]), a[DEPTH]
    _, packed, _ = _places(a, tokens)
    if tokens > 1:
        for t in range(tokens):
            for k in range(depth):
                packed[t * depth + k] = x[t * a[X_STRIDE] + k]
    streams = STREAMS if tokens == 1 else FEW_STREAMS
    apart = a[N] // streams
    if a[N] * depth > SERIAL:
        parallel(dot_rows(), address, tokens, apart, apart)
    else:
        for i in range(apart):
            call_worker(dot_rows(), address, tokens, apart, i, 0)
    for i in range(apart * streams, a[N]):  # the rest: all streams on one row
        call_worker(dot_rows(), address, tokens, 0, i, 0)


# ---- many tokens ------------------------------------------------------------------------------------------------
@worker
def pack_rows(a, tokens, first, block, thread):
    """Tokens of one tile as [slice][k][ROWS], slices of all tiles together."""
    x, packed, padded, depth = at(float32, a[X]), _places(a, tokens)[1], (tokens + ROWS - 1) // ROWS * ROWS, a[DEPTH]
    for k in range(0, depth, SLICE):
        size = min(SLICE, depth - k)
        to = k * padded + block * ROWS * size
        for r in range(ROWS):
            row = block * ROWS + r
            for i in range(size):
                packed[to + i * ROWS + r] = x[row * a[X_STRIDE] + k + i] if row < tokens else np.float32(0)


@njit(nogil=True, error_model="numpy")
def _transpose_corner(w, w_stride, source, rows, size, edge, strip, to):
    """16 x 16 or fewer elements by way of `edge`, which is filled up with zeros."""
    for r in range(16):
        store(edge, r * 16, load_end(w, source + r * w_stride, size if r < rows else 0))
    tile = transpose(load_tile(F, 16, edge, 0, 16))
    for k in range(size):
        store(strip, to + k * BLOCK, tile[k])


@njit(nogil=True, error_model="numpy")
def _transpose_strip(w, w_stride, n, start, first, size, edge, strip):
    """BLOCK rows of the weight from `start`, K from `first` on, as strip[k][BLOCK]."""
    for c in range(COLUMNS):
        row = start + 16 * c
        for k in range(0, size, 16):
            source, to = row * w_stride + first + k, k * BLOCK + 16 * c
            if row + 16 <= n and k + 16 <= size:
                store_tile(strip, to, BLOCK, 16, 1, transpose(load_floats(16, w, source, w_stride)))
            else:
                _transpose_corner(w, w_stride, source, max(0, min(16, n - row)), min(16, size - k), edge, strip, to)


@njit(nogil=True, error_model="numpy")
def _tile(strip, packed, x_at, size, start, start_at, start_stride, target, to, stride):
    """target = start + packed tokens times the strip: ROWS x BLOCK."""
    acc = zeros(F, TILE)
    for k in range(size):
        acc = outer_add(acc, load_tile(F, COLUMNS, strip, k * BLOCK, 16), packed, x_at + k * ROWS)
    store_tile(target, to, stride, 16, COLUMNS, add_tile(acc, load_rows(F, ROWS, COLUMNS, start, start_at, start_stride, 16)))


@njit(nogil=True, error_model="numpy")
def _sweep(strip, packed, tokens, padded, first, size, n, column, bias, out, out_stride, edge):
    """Add one slice of K to BLOCK columns of `out`, for all tokens; ragged tiles by way of `edge`."""
    for block in range(padded // ROWS):
        x_at, to = first * padded + block * ROWS * size, block * ROWS * out_stride + column
        rows, width = min(ROWS, tokens - block * ROWS), min(BLOCK, n - column)
        if rows == ROWS and width == BLOCK:
            if first == 0:
                _tile(strip, packed, x_at, size, bias, column, 0, out, to, out_stride)
            else:
                _tile(strip, packed, x_at, size, out, to, out_stride, out, to, out_stride)
            continue
        for r in range(rows):
            for c in range(width):
                edge[r * BLOCK + c] = out[to + r * out_stride + c] if first else bias[column + c]
        _tile(strip, packed, x_at, size, edge, 0, BLOCK, edge, 0, BLOCK)
        for r in range(rows):
            for c in range(width):
                out[to + r * out_stride + c] = edge[r * BLOCK + c]


@worker
def sweep_strips(a, tokens, group, share, thread):
    """Take groups of strips of outputs until none is left. Slices of K outermost: the slice of x stays in L2."""
    n, depth, padded, strips = a[N], a[DEPTH], (tokens + ROWS - 1) // ROWS * ROWS, (a[N] + BLOCK - 1) // BLOCK
    bias, packed, scratch = _places(a, tokens)
    strip = at(float32, scratch + 4 * thread * (SLICE * BLOCK + EDGE))
    edge = at(float32, scratch + 4 * thread * (SLICE * BLOCK + EDGE) + 4 * SLICE * BLOCK)
    begin = fetch_add(at(int64, a[WORKSPACE]), 0, group)
    while begin < strips:
        for first in range(0, depth, SLICE):
            size = min(SLICE, depth - first)
            for i in range(begin, min(begin + group, strips)):
                if a[W_TYPE]:
                    _transpose_strip(at(uint16, a[W]), a[W_STRIDE], n, i * BLOCK, first, size, edge, strip)
                else:
                    _transpose_strip(at(float32, a[W]), a[W_STRIDE], n, i * BLOCK, first, size, edge, strip)
                _sweep(strip, packed, tokens, padded, first, size, n, i * BLOCK, bias, at(float32, a[OUT]), a[OUT_STRIDE], edge)
        begin = fetch_add(at(int64, a[WORKSPACE]), 0, group)


# ---- the step ---------------------------------------------------------------------------------------------------
@njit(nogil=True, error_model="numpy")
def _linear(a, address, tokens):
    n, given, bias = a[N], at(float32, a[BIAS]), _places(a, tokens)[0]
    strips = (n + BLOCK - 1) // BLOCK
    for i in range(strips * BLOCK):
        bias[i] = given[i] if a[BIAS] and i < n else np.float32(0)
    if tokens <= FEW:
        _by_streams(a, address, tokens)
        return
    at(int64, a[WORKSPACE])[0] = 0
    parallel(pack_rows(), address, tokens, 0, (tokens + ROWS - 1) // ROWS)
    parallel(sweep_strips(), address, tokens, max(1, min(8, strips // (4 * thread_count()))), thread_count())


@cfunc(STEP, cache=True)
def step(a, state):
    if state[a[TOKENS]]:
        _linear(a, carray(a, 1).ctypes.data, state[a[TOKENS]])
