"""x times block-quantised weights, with x rounded to int8 per token and block: see the reference for layouts."""
import numpy as np
from numba import carray, cfunc, njit

from edgeattn.kernels_cpu.gemm_nbits import COLUMNS, ROWS, SLICE, gemm_strip
from edgeattn.kernels_cpu.gemv_nbits import FEW, gemv_1_4, gemv_1_8, gemv_few_4, gemv_few_8
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.quantise import MAX_BLOCK, clear_row, quantise_row
from edgeattn.kernels_cpu.steps import STEP, WIDTH, aligned, call, f32_at, i8_at, i32_at, thread_count, u8_at, u16_at

ARGS = ("x", "x.rows", "x.stride", "codes", "scales", "zero_points", "bias", "out", "out.stride", "bits", "block_size", "K", "N", "workspace")
(X, TOKENS, X_STRIDE, CODES, SCALES, ZERO_POINTS, BIAS, OUT, OUT_STRIDE, BITS, BLOCK_SIZE, K, N, WORKSPACE) = range(len(ARGS))
SERIAL_BYTES = 1 << 17  # weights that one thread reads sooner than a parallel region starts
TILE_FLOATS = FEW * 16 * 8


def matmul_nbits(x, codes, scales, zero_points=None, bias=None, *, bits, block_size, K, N):
    out = aligned((len(x), N), np.float32)
    tensors = dict(x=x, codes=codes, scales=scales.view(np.uint16), zero_points=zero_points, bias=bias, out=out)
    call(step, ARGS, tensors, dict(bits=bits, block_size=block_size, K=K, N=N), workspace_bytes=workspace_bytes)
    return out


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Scratch of the threads, then quantised activations."""
    units = _units.py_func(rows, attributes["K"], attributes["block_size"])
    return STRIP_BYTES * threads + units * (attributes["block_size"] + 12) + 4 * 64


# A thread's scratch: unpacked codes, their scales, their scaled zero points, a tile of results, a block of activations twice.
W_BYTES, WS_BYTES = SLICE * 16 * COLUMNS, SLICE // 16 * 16 * COLUMNS * 4
STRIP_BYTES = W_BYTES + 2 * WS_BYTES + TILE_FLOATS * 4 + MAX_BLOCK * 4 + MAX_BLOCK


@njit(nogil=True, error_model="numpy")
def _strip(args, thread):
    w = args[WORKSPACE] + STRIP_BYTES * thread
    ws, wz = w + W_BYTES, w + W_BYTES + WS_BYTES
    tile = wz + WS_BYTES
    floats = tile + 4 * TILE_FLOATS
    return (u8_at(w, W_BYTES), f32_at(ws, WS_BYTES // 4), f32_at(wz, WS_BYTES // 4), f32_at(tile, TILE_FLOATS), f32_at(floats, MAX_BLOCK),
            i8_at(floats + 4 * MAX_BLOCK, MAX_BLOCK))


@njit(nogil=True, error_model="numpy")
def _tile_rows(tokens):
    """Tokens that are worked on together."""
    return 1 if tokens == 1 else FEW if tokens <= FEW else ROWS


@njit(nogil=True, error_model="numpy")
def _depth(size):
    """Blocks in a slice of K."""
    return max(1, SLICE // size)


@njit(nogil=True, error_model="numpy")
def _units(tokens, k, size):
    """Blocks of activations, the tokens padded to whole tiles. (For the workspace: as for any smaller number of tokens.)"""
    return (tokens + ROWS - 1) // ROWS * ROWS * ((k + size - 1) // size)


@njit(nogil=True, error_model="numpy")
def _activations(args, tokens):
    """The quantised activations in the workspace: codes, scales, starts, sums (see quantise_row)."""
    n = _units(tokens, args[K], args[BLOCK_SIZE])
    codes = args[WORKSPACE] + STRIP_BYTES * thread_count()
    scales = codes + (n * args[BLOCK_SIZE] + 63) // 64 * 64
    floats = (n * 4 + 63) // 64 * 64
    return i8_at(codes, n * args[BLOCK_SIZE]), f32_at(scales, n), i32_at(scales + floats, n), f32_at(scales + 2 * floats, n)


@njit(nogil=True, error_model="numpy")
def _weights(args):
    panels, blocks = (args[N] + 15) // 16, (args[K] + args[BLOCK_SIZE] - 1) // args[BLOCK_SIZE]
    n = panels * blocks * 16
    return u8_at(args[CODES], n * args[BLOCK_SIZE] * args[BITS] // 8), u16_at(args[SCALES], n), u8_at(args[ZERO_POINTS], n)


@worker
def quantise(a, tokens, depth, group, thread):
    """Tile `group` of activations; `depth` blocks to a slice of K."""
    args, tile = carray(a, WIDTH), _tile_rows(tokens)
    codes, scales, starts, sums = _activations(args, tokens)
    _, _, _, _, floats, bytes_ = _strip(args, thread)
    x, words, groups = f32_at(args[X], tokens * args[X_STRIDE]), codes.view(np.int32), (tokens + tile - 1) // tile
    for row in range(tile):
        token = group * tile + row
        if token < tokens:
            quantise_row(x, token * args[X_STRIDE], args[K], args[BLOCK_SIZE], args[BITS], words, scales, starts, sums, tile, group, groups,
                         row, depth, floats, bytes_)
        else:
            clear_row(args[K], args[BLOCK_SIZE], scales, sums, tile, group, groups, row, depth)


@worker
def gemv(a, tokens, parts, part, thread):
    """One of `parts` shares of the panels, for up to FEW tokens."""
    args = carray(a, WIDTH)
    codes, scales, zero_points = _weights(args)
    x, x_scales, starts, sums = _activations(args, tokens)
    out, bias, tile = f32_at(args[OUT], tokens * args[OUT_STRIDE]), f32_at(args[BIAS], args[N]), _strip(args, thread)[3]
    panels, blocks = (args[N] + 15) // 16, (args[K] + args[BLOCK_SIZE] - 1) // args[BLOCK_SIZE]
    first, last = panels * part // parts, panels * (part + 1) // parts
    flags = (args[ZERO_POINTS] != 0, args[BIAS] != 0)
    weights, activations = (codes, scales, zero_points), (x, x_scales, starts, sums)
    sizes = (args[BLOCK_SIZE], blocks, first, last, tokens, args[N], args[OUT_STRIDE])
    if tokens == 1 and args[BITS] == 4:
        gemv_1_4(weights, activations, bias, out, tile, sizes, flags)
    elif tokens == 1:
        gemv_1_8(weights, activations, bias, out, tile, sizes, flags)
    elif args[BITS] == 4:
        gemv_few_4(weights, activations, bias, out, tile, sizes, flags)
    else:
        gemv_few_8(weights, activations, bias, out, tile, sizes, flags)


@worker
def gemm(a, tokens, first, strip, thread):
    """One strip of outputs of all tokens, for the slice of K that starts with block `first`."""
    args = carray(a, WIDTH)
    blocks = (args[K] + args[BLOCK_SIZE] - 1) // args[BLOCK_SIZE]
    out, bias = f32_at(args[OUT], tokens * args[OUT_STRIDE]), f32_at(args[BIAS], args[N])
    w, ws, wz, tile, floats, _ = _strip(args, thread)
    sizes = (args[BLOCK_SIZE], blocks, first, min(_depth(args[BLOCK_SIZE]), blocks - first), tokens, args[N], args[OUT_STRIDE])
    gemm_strip(_weights(args), _activations(args, tokens), bias, out, (w, ws, wz, tile, floats), strip, args[BITS], sizes,
               (args[ZERO_POINTS] != 0, args[BIAS] != 0))


@njit(nogil=True, error_model="numpy")
def _run(args, tokens, blocks):
    address, panels = args.ctypes.data, (args[N] + 15) // 16
    if tokens <= FEW:
        threads = thread_count()
        call_worker(quantise(), address, tokens, blocks, 0, 0)
        if blocks * args[BLOCK_SIZE] * args[N] * args[BITS] // 8 > SERIAL_BYTES:
            parallel(gemv(), address, tokens, threads, threads)
        else:
            call_worker(gemv(), address, tokens, 1, 0, 0)
        return
    depth = _depth(args[BLOCK_SIZE])
    parallel(quantise(), address, tokens, depth, (tokens + ROWS - 1) // ROWS)
    for first in range(0, blocks, depth):  # slices of K outermost: that of the activations stays in the second-level cache
        parallel(gemm(), address, tokens, first, (panels + COLUMNS - 1) // COLUMNS)


@cfunc(STEP, cache=True)
def step(a, state):
    args, tokens = carray(a, WIDTH), state[a[TOKENS]]
    if tokens > 0:
        _run(args, tokens, (args[K] + args[BLOCK_SIZE] - 1) // args[BLOCK_SIZE])
