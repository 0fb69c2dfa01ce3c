"""x times block-quantised weights, with x rounded to int8 per token and block: see the reference for layouts."""
import numpy as np
from numba import carray, cfunc, float32, int8, int32, njit, uint8, uint16

from edgeattn.kernels_cpu.gemm_nbits import COLUMNS, ROWS, SLICE, STEPS, gemm_strip, multiply, tile_rows
from edgeattn.kernels_cpu.gemv_nbits import (FEW, GROUPED, NO_ZEROS, ZERO_BYTES, ZERO_HALVES, gemv_1_2, gemv_1_3, gemv_1_4, gemv_1_8,
                                             gemv_few_2, gemv_few_3, gemv_few_4, gemv_few_8)
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.quantise import MAX_BLOCK, clear_row, quantise_row
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import STEP, TYPES, aligned, call, thread_count

ARGS = ("x", "x.rows", "x.stride", "codes", "scales", "zero_points", "bias", "out", "out.stride", "bits", "block_size", "K", "N",
        "workspace", "zero_points.type")
(X, TOKENS, X_STRIDE, CODES, SCALES, ZERO_POINTS, BIAS, OUT, OUT_STRIDE, BITS, BLOCK_SIZE, K, N, WORKSPACE,
 ZERO_TYPE) = range(len(ARGS))
WIDE = 8192              # outputs from which the second slice of K costs more than it saves
SERIAL_BYTES = 1 << 17  # weights that one thread reads sooner than a parallel region starts
TILE_FLOATS = FEW * 16 * 8
BYTES = TYPES["uint8"]


def matmul_nbits(x, codes, scales, zero_points=None, bias=None, *, bits, block_size, K, N):
    out = aligned((len(x), N), np.float32)
    zero_points = zero_points.view(np.uint16) if zero_points is not None and zero_points.dtype == np.float16 else zero_points
    tensors = dict(x=x, codes=codes, scales=scales.view(np.uint16), zero_points=zero_points, bias=bias, out=out)
    call(step, ARGS, tensors, dict(bits=bits, block_size=block_size, K=K, N=N), workspace_bytes=workspace_bytes)
    return out


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Quantised activations, then scratch of the threads."""
    return _activation_bytes.py_func(rows, attributes["K"], attributes["block_size"])[-1] + STRIP_BYTES * threads


# A thread's scratch: unpacked codes, their scales, their scaled zero points, a tile of results, a block of activations twice.
W_BYTES, WS_BYTES = 2 * SLICE * 16 * COLUMNS, 2 * SLICE // 16 * 16 * COLUMNS * 4
STRIP_BYTES = W_BYTES + 2 * WS_BYTES + TILE_FLOATS * 4 + MAX_BLOCK * 4 + MAX_BLOCK


@njit(nogil=True, error_model="numpy")
def _depth(size, k, n, tokens):
    """Blocks in a slice of K: all for few tokens. Every slice but the first reads out again and writes it: where out is wide, twice the
    slice, whose codes then come from the second-level cache, costs less."""
    if tokens <= GROUPED:
        return (k + size - 1) // size
    whole = k <= 2 * SLICE and n >= WIDE
    return max(1, (2 * SLICE if whole else SLICE) // size)


@njit(nogil=True, error_model="numpy")
def _activation_bytes(tokens, k, size):
    """Where in the workspace the scales, starts and sums of quantised activations begin (their codes do at 0), and the end."""
    tile = tile_rows(tokens)
    units = (tokens + tile - 1) // tile * tile * ((k + size - 1) // size)  # blocks, the tokens padded to whole tiles
    codes, floats = (units * size + 63) // 64 * 64, (units * 4 + 63) // 64 * 64
    return codes, codes + floats, codes + 2 * floats, codes + 3 * floats


@njit(nogil=True, error_model="numpy")
def _activations(a, tokens):
    """The quantised activations in the workspace: codes, scales, starts, sums (see quantise_row)."""
    scales, starts, sums, _ = _activation_bytes(tokens, a[K], a[BLOCK_SIZE])
    base = a[WORKSPACE]
    return at(int8, base), at(float32, base + scales), at(int32, base + starts), at(float32, base + sums)


@njit(nogil=True, error_model="numpy")
def _scratch(a, tokens, thread):
    """Addresses of a thread's w, ws, wz, tile, floats, bytes."""
    w = a[WORKSPACE] + _activation_bytes(tokens, a[K], a[BLOCK_SIZE])[3] + STRIP_BYTES * thread
    tile = w + W_BYTES + 2 * WS_BYTES
    return w, w + W_BYTES, w + W_BYTES + WS_BYTES, tile, tile + 4 * TILE_FLOATS, tile + 4 * TILE_FLOATS + 4 * MAX_BLOCK


@njit(nogil=True, error_model="numpy")
def _weights(a):
    return at(uint8, a[CODES]), at(uint16, a[SCALES]), at(uint8, a[ZERO_POINTS])


@njit(nogil=True, error_model="numpy")
def _zeros_are(a):
    return NO_ZEROS if a[ZERO_POINTS] == 0 else ZERO_BYTES if a[ZERO_TYPE] == BYTES else ZERO_HALVES


@worker
def quantise(a, tokens, depth, group, thread):
    """Tile `group` of activations; `depth` blocks to a slice of K."""
    k, size, tile = a[K], a[BLOCK_SIZE], tile_rows(tokens)
    _, scales, starts, sums = _activations(a, tokens)
    _, _, _, _, floats, bytes_ = _scratch(a, tokens, thread)
    groups, together = (tokens + tile - 1) // tile, STEPS if tile == ROWS else 1
    for row in range(tile):
        token = group * tile + row
        if token < tokens:
            quantise_row(at(float32, a[X]), token * a[X_STRIDE], k, size, a[BITS], at(int32, a[WORKSPACE]),
                         scales, starts, sums, tile, together, group, groups, row, depth, at(float32, floats),
                         at(int8, bytes_), at(int32, bytes_))
        else:
            clear_row(k, size, scales, sums, tile, group, groups, row, depth)


@worker
def gemv(a, tokens, parts, part, thread):
    """One of `parts` shares of the panels, for up to GROUPED tokens."""
    weights, activations = _weights(a), _activations(a, tokens)
    out, bias, tile = at(float32, a[OUT]), at(float32, a[BIAS]), at(float32, _scratch(a, tokens, thread)[3])
    panels, blocks = (a[N] + 15) // 16, (a[K] + a[BLOCK_SIZE] - 1) // a[BLOCK_SIZE]
    sizes = (a[BLOCK_SIZE], blocks, panels * part // parts, panels * (part + 1) // parts, tokens, a[N], a[OUT_STRIDE])
    flags = (_zeros_are(a), a[BIAS] != 0)
    if tokens == 1:
        if a[BITS] == 2:
            gemv_1_2(weights, activations, bias, out, tile, sizes, flags)
        elif a[BITS] == 3:
            gemv_1_3(weights, activations, bias, out, tile, sizes, flags)
        elif a[BITS] == 4:
            gemv_1_4(weights, activations, bias, out, tile, sizes, flags)
        else:
            gemv_1_8(weights, activations, bias, out, tile, sizes, flags)
    elif a[BITS] == 2:
        gemv_few_2(weights, activations, bias, out, tile, sizes, flags)
    elif a[BITS] == 3:
        gemv_few_3(weights, activations, bias, out, tile, sizes, flags)
    elif a[BITS] == 4:
        gemv_few_4(weights, activations, bias, out, tile, sizes, flags)
    else:
        gemv_few_8(weights, activations, bias, out, tile, sizes, flags)


@worker
def gemm(a, tokens, first, strip, thread):
    """One strip of outputs of all tokens, for the slice of K that starts with block `first`."""
    blocks = (a[K] + a[BLOCK_SIZE] - 1) // a[BLOCK_SIZE]
    w, ws, wz, tile, floats, _ = _scratch(a, tokens, thread)
    scratch = at(uint8, w), at(float32, ws), at(float32, wz), at(float32, tile), at(float32, floats)
    sizes = (a[BLOCK_SIZE], blocks, first, min(_depth(a[BLOCK_SIZE], a[K], a[N], tokens), blocks - first), tokens, a[N], a[OUT_STRIDE])
    gemm_strip(_weights(a), _activations(a, tokens), at(float32, a[BIAS]), at(float32, a[OUT]), scratch, strip, a[BITS], sizes,
               (_zeros_are(a), a[BIAS] != 0))


@njit(nogil=True, error_model="numpy")
def _run(a, address, tokens):
    size = a[BLOCK_SIZE]
    blocks = (a[K] + size - 1) // size
    shares = thread_count() if blocks * size * a[N] * a[BITS] // 8 * (tokens + FEW - 1) // FEW > SERIAL_BYTES else 1
    multiply((quantise(), gemv(), gemm()), address, tokens, (a[K], blocks, _depth(size, a[K], a[N], tokens), (a[N] + 15) // 16), shares)


@cfunc(STEP, cache=True)
def step(a, state):
    if state[a[TOKENS]] > 0:
        _run(a, carray(a, 1).ctypes.data, state[a[TOKENS]])
