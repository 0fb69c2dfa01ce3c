"""x, rounded to integers per token, times ternary weights: see the reference for layouts.

As one scale holds for all of a token, and one for all of an output, sums of integers run over all of K: what matmul_nbits does
for a block is done here for a whole row of up to FEW tokens, and for a slice of K when there are more.
"""
import numpy as np
from numba import carray, cfunc, float32, int8, int32, njit, uint8

from edgeattn.kernels_cpu.gemm_nbits import COLUMNS, ROWS, STEPS, sweep_tokens, unpack_codes
from edgeattn.kernels_cpu.gemv_nbits import FEW, NO_ZEROS, SHAPES, build
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.quantise_tokens import clear_token, quantise_token
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import STEP, aligned, call, thread_count

ARGS = ("x", "x.rows", "x.stride", "codes", "codes.1", "scales", "bias", "out", "out.stride", "bits", "activation_bits", "K", "N", "workspace")
(X, TOKENS, X_STRIDE, CODES, K_STEPS, SCALES, BIAS, OUT, OUT_STRIDE, BITS, ACTIVATION_BITS, K, N, WORKSPACE) = range(len(ARGS))
UNIT = 128              # K is padded to a multiple of it
SLICE = 1024            # of K in a strip of unpacked weights
SERIAL_BYTES = 1 << 17  # weights that one thread reads sooner than a parallel region starts
# A thread's scratch: unpacked codes, their scales, a tile of results, starts.
W_BYTES, ROW_BYTES, TILE_BYTES = SLICE * 16 * COLUMNS, 4 * 16 * COLUMNS, 4 * FEW * 16 * 8
STRIP_BYTES = W_BYTES + 2 * ROW_BYTES + TILE_BYTES

gemv_1, gemv_few = build(1, *SHAPES[0], 2, False), build(FEW, *SHAPES[1], 2, False)


def matmul_ternary(x, codes, scales, bias=None, *, bits, activation_bits, K, N):
    out = aligned((len(x), N), np.float32)
    call(step, ARGS, dict(x=x, codes=codes, scales=scales, bias=bias, out=out),
         dict(bits=bits, activation_bits=activation_bits, K=K, N=N), workspace_bytes=workspace_bytes)
    return out


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Scales of whole panels, integers of the tokens, then scratch of the threads."""
    padded, n = tensors["codes"].shape[1] * 16, attributes["N"]
    return _places.py_func(rows, padded, n)[-1] + (STRIP_BYTES + padded) * threads


@njit(nogil=True, error_model="numpy")
def _places(tokens, padded, n):
    """Where in the workspace the tokens' codes, their scales and starts begin (the weights' scales do at 0), and the end."""
    rows = (tokens + ROWS - 1) // ROWS * ROWS
    codes = (n + 15) // 16 * 64
    scales = codes + rows * padded
    floats = (rows * (padded // UNIT) * 4 + 63) // 64 * 64
    return codes, scales, scales + floats, scales + 2 * floats


@njit(nogil=True, error_model="numpy")
def _depth(padded, tokens):
    """K of a slice: all of it for few tokens, else equal parts."""
    if tokens <= FEW:
        return padded
    slices = (padded + SLICE - 1) // SLICE
    return (padded // UNIT + slices - 1) // slices * UNIT


@njit(nogil=True, error_model="numpy")
def _activations(a, tokens, first):
    """Codes, scales, starts of the tokens (quantise_token), of the slice of K that starts at `first`; in place of sums, which only zero
    points need, anything."""
    codes, scales, starts, _ = _places(tokens, a[K_STEPS] * 16, a[N])
    base, rows = a[WORKSPACE], (tokens + ROWS - 1) // ROWS * ROWS
    later = first // _depth(a[K_STEPS] * 16, tokens) * rows * 4
    return (at(int8, base + codes + first * rows), at(float32, base + scales + later), at(int32, base + starts + later),
            at(float32, base + scales))


@njit(nogil=True, error_model="numpy")
def _scales(a):
    """Whole panels of scales: a copy where the last panel is not whole."""
    return at(float32, a[SCALES] if a[N] % 16 == 0 else a[WORKSPACE])


@njit(nogil=True, error_model="numpy")
def _scratch(a, tokens, thread):
    """Address of a thread's scratch; that for the codes of one token begins STRIP_BYTES further."""
    return a[WORKSPACE] + _places(tokens, a[K_STEPS] * 16, a[N])[3] + (STRIP_BYTES + a[K_STEPS] * 16) * thread


@worker
def quantise(a, tokens, depth, group, thread):
    """Tile `group` of tokens."""
    padded, tile = a[K_STEPS] * 16, 1 if tokens == 1 else FEW if tokens <= FEW else ROWS
    _, scales, starts, _ = _activations(a, tokens, 0)
    codes, bytes_ = _places(tokens, padded, a[N])[0], _scratch(a, tokens, thread) + STRIP_BYTES
    groups, together = (tokens + tile - 1) // tile, STEPS if tile == ROWS else 1
    for row in range(tile):
        token = group * tile + row
        if token < tokens:
            quantise_token(at(float32, a[X]), token * a[X_STRIDE], a[K], padded, depth, a[ACTIVATION_BITS],
                           at(int32, a[WORKSPACE] + codes), scales, starts, tile, together, group, groups, row, at(int8, bytes_),
                           at(int32, bytes_))
        else:
            clear_token(padded, depth, scales, tile, group, groups, row)


@worker
def gemv(a, tokens, parts, part, thread):
    """One of `parts` shares of the panels, for up to FEW tokens."""
    panels, scales = (a[N] + 15) // 16, _scales(a)
    weights = at(uint8, a[CODES]), scales, at(uint8, a[CODES])
    sizes = (a[K_STEPS] * 16, 1, panels * part // parts, panels * (part + 1) // parts, tokens, a[N], a[OUT_STRIDE])
    tile, flags = at(float32, _scratch(a, tokens, thread)), (NO_ZEROS, a[BIAS] != 0)
    if tokens == 1:
        gemv_1(weights, _activations(a, tokens, 0), at(float32, a[BIAS]), at(float32, a[OUT]), tile, sizes, flags)
    else:
        gemv_few(weights, _activations(a, tokens, 0), at(float32, a[BIAS]), at(float32, a[OUT]), tile, sizes, flags)


@worker
def gemm(a, tokens, first, strip, thread):
    """One strip of outputs of all tokens, for the slice of K that starts at `first`."""
    padded, n = a[K_STEPS] * 16, a[N]
    size, w = min(_depth(padded, tokens), padded - first), _scratch(a, tokens, thread)
    ws, tile, scales = at(float32, w + W_BYTES), w + W_BYTES + ROW_BYTES, _scales(a)
    for c in range(COLUMNS):  # an odd panel at the end is taken twice and stored once
        panel = min(strip * COLUMNS + c, (n - 1) // 16)
        for i in range(16):
            ws[c * 16 + i] = scales[panel * 16 + i]
        unpack_codes(at(uint8, a[CODES]), (panel * padded + first) * 4, size, 2, at(uint8, w), c * 64)
    scratch = at(uint8, w), ws, ws, at(float32, tile), at(float32, tile + TILE_BYTES)
    sweep_tokens(_activations(a, tokens, first), at(float32, a[BIAS]), at(float32, a[OUT]), scratch, strip, 2,
                 (0, 1, size // 4, tokens, n, a[OUT_STRIDE]), (False, a[BIAS] != 0, first == 0))


@njit(nogil=True, error_model="numpy")
def _run(a, address, tokens):
    panels, threads, padded = (a[N] + 15) // 16, thread_count(), a[K_STEPS] * 16
    depth = _depth(padded, tokens)
    if a[N] % 16:
        given, whole = at(float32, a[SCALES]), at(float32, a[WORKSPACE])
        for i in range(panels * 16):
            whole[i] = given[i] if i < a[N] else np.float32(0)
    if tokens <= FEW:
        call_worker(quantise(), address, tokens, depth, 0, 0)
        if padded * a[N] // 4 > SERIAL_BYTES:
            parallel(gemv(), address, tokens, threads, threads)
        else:
            call_worker(gemv(), address, tokens, 1, 0, 0)
        return
    parallel(quantise(), address, tokens, depth, (tokens + ROWS - 1) // ROWS)
    for first in range(0, padded, depth):  # slices of K outermost: that of the activations stays in the second-level cache
        parallel(gemm(), address, tokens, first, (panels + COLUMNS - 1) // COLUMNS)


@cfunc(STEP, cache=True)
def step(a, state):
    if state[a[TOKENS]] > 0:
        _run(a, carray(a, 1).ctypes.data, state[a[TOKENS]])
