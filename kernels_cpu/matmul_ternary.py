"""x, rounded to integers per token, times ternary weights: see the reference for layouts.

As one scale holds for all of a token, and one for all of an output, sums of integers run over all of K: what matmul_nbits does
for a block is done here for a whole row of up to FEW tokens, and for a slice of K when there are more.
"""
import numpy as np
from numba import carray, cfunc, float32, int8, int32, njit, uint8

from edgeattn.kernels_cpu.gemm_nbits import COLUMNS, ROWS, STEPS, sweep_tokens, unpack_codes, unpack_trits
from edgeattn.kernels_cpu.gemv_nbits import FEW, NO_ZEROS, SHAPES, build
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.quantise_tokens import clear_token, quantise_token
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.simd_bits import WORDS
from edgeattn.kernels_cpu.steps import STEP, aligned, call, thread_count

ARGS = ("x", "x.rows", "x.stride", "codes", "codes.1", "scales", "bias", "out", "out.stride", "bits", "activation_bits", "K", "N",
        "workspace")
(X, TOKENS, X_STRIDE, CODES, K_STEPS, SCALES, BIAS, OUT, OUT_STRIDE, BITS, ACTIVATION_BITS, K, N, WORKSPACE) = range(len(ARGS))
SLICE = 1024            # of K in a strip of unpacked weights, at most
SERIAL_BYTES = 1 << 17  # weights that one thread reads sooner than a parallel region starts
# A thread's scratch: unpacked codes, their scales, a tile of results, starts.
W_BYTES, ROW_BYTES, TILE_BYTES = SLICE * 16 * COLUMNS, 4 * 16 * COLUMNS, 4 * FEW * 16 * 8
STRIP_BYTES = W_BYTES + 2 * ROW_BYTES + TILE_BYTES

gemv_1_2, gemv_1_1 = (build(1, *SHAPES[0], bits, False) for bits in (2, 1))
gemv_few_2, gemv_few_1 = (build(FEW, *SHAPES[1], bits, False) for bits in (2, 1))


def matmul_ternary(x, codes, scales, bias=None, *, bits, activation_bits, K, N):
    out = aligned((len(x), N), np.float32)
    call(step, ARGS, dict(x=x, codes=codes, scales=scales, bias=bias, out=out),
         dict(bits=bits, activation_bits=activation_bits, K=K, N=N), workspace_bytes=workspace_bytes)
    return out


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Scales of whole panels, integers of the tokens, then scratch of the threads."""
    bits, padded = attributes["bits"], _padded.py_func(tensors["codes"].shape[1], attributes["bits"])
    return _places.py_func(max(rows, FEW), padded, attributes["N"], bits)[-1] + (STRIP_BYTES + _token_bytes.py_func(padded)) * threads


@njit(nogil=True, error_model="numpy")
def _padded(steps, bits):
    """K, filled up to whole steps."""
    return steps * (20 if bits == 1 else 16)


@njit(nogil=True, error_model="numpy")
def _token_bytes(padded):
    """Scratch of quantise_token."""
    return (192 + padded + padded // 20 * 4 * WORDS) // 64 * 64


@njit(nogil=True, error_model="numpy")
def _places(tokens, padded, n, bits):
    """Where in the workspace the tokens' codes, their scales and starts begin (the weights' scales do at 0), and the end."""
    rows, unit = (tokens + ROWS - 1) // ROWS * ROWS, 40 if bits == 1 else 128
    codes = (n + 15) // 16 * 64
    per_token = padded // 20 * 4 * WORDS if bits == 1 and tokens <= FEW else padded
    scales = codes + (rows * per_token + 63) // 64 * 64
    floats = (rows * (padded // unit) * 4 + 63) // 64 * 64
    return codes, scales, scales + floats, scales + 2 * floats


@njit(nogil=True, error_model="numpy")
def _depth(padded, bits, tokens):
    """K of a slice: all of it for few tokens, else equal parts of at most SLICE."""
    unit = 40 if bits == 1 else 128
    if tokens <= FEW:
        return padded
    slices = (padded + SLICE // unit * unit - 1) // (SLICE // unit * unit)
    return (padded // unit + slices - 1) // slices * unit


@njit(nogil=True, error_model="numpy")
def _activations(a, tokens, first):
    """Codes, scales, starts of the tokens (quantise_token), of the slice of K that starts at `first`; in place of sums, which only zero
    points need, anything."""
    padded = _padded(a[K_STEPS], a[BITS])
    codes, scales, starts, _ = _places(tokens, padded, a[N], a[BITS])
    base, rows = a[WORKSPACE], (tokens + ROWS - 1) // ROWS * ROWS
    later = first // _depth(padded, a[BITS], tokens) * rows * 4
    return (at(int8, base + codes + first * rows), at(float32, base + scales + later), at(int32, base + starts + later),
            at(float32, base + scales))


@njit(nogil=True, error_model="numpy")
def _scales(a):
    """Whole panels of scales: a copy where the last panel is not whole."""
    return at(float32, a[SCALES] if a[N] % 16 == 0 else a[WORKSPACE])


@njit(nogil=True, error_model="numpy")
def _scratch(a, tokens, thread):
    """Address of a thread's scratch; that of quantise_token begins STRIP_BYTES further."""
    padded = _padded(a[K_STEPS], a[BITS])
    return a[WORKSPACE] + _places(tokens, padded, a[N], a[BITS])[3] + (STRIP_BYTES + _token_bytes(padded)) * thread


@worker
def quantise(a, tokens, depth, group, thread):
    """Tile `group` of tokens."""
    padded, tile = _padded(a[K_STEPS], a[BITS]), 1 if tokens == 1 else FEW if tokens <= FEW else ROWS
    _, scales, starts, _ = _activations(a, tokens, 0)
    codes, scratch = at(int32, a[WORKSPACE] + _places(tokens, padded, a[N], a[BITS])[0]), _scratch(a, tokens, thread) + STRIP_BYTES
    groups, together = (tokens + tile - 1) // tile, STEPS if tile == ROWS else 1
    for row in range(tile):
        token = group * tile + row
        if token < tokens:
            quantise_token(at(float32, a[X]), token * a[X_STRIDE], a[K], padded, depth, a[BITS], a[ACTIVATION_BITS], codes, scales, starts,
                           tile, together, group, groups, row, scratch, a[BITS] == 1 and tokens <= FEW)
        else:
            clear_token(padded, depth, scales, tile, group, groups, row)


@worker
def gemv(a, tokens, parts, part, thread):
    """One of `parts` shares of the panels, for up to FEW tokens."""
    panels, scales = (a[N] + 15) // 16, _scales(a)
    weights, activations = (at(uint8, a[CODES]), scales, at(uint8, a[CODES])), _activations(a, tokens, 0)
    sizes = (_padded(a[K_STEPS], a[BITS]), 1, panels * part // parts, panels * (part + 1) // parts, tokens, a[N], a[OUT_STRIDE])
    bias, out, tile = at(float32, a[BIAS]), at(float32, a[OUT]), at(float32, _scratch(a, tokens, thread))
    flags = NO_ZEROS, a[BIAS] != 0
    if tokens == 1 and a[BITS] == 2:
        gemv_1_2(weights, activations, bias, out, tile, sizes, flags)
    elif tokens == 1:
        gemv_1_1(weights, activations, bias, out, tile, sizes, flags)
    elif a[BITS] == 2:
        gemv_few_2(weights, activations, bias, out, tile, sizes, flags)
    else:
        gemv_few_1(weights, activations, bias, out, tile, sizes, flags)


@worker
def gemm(a, tokens, first, strip, thread):
    """One strip of outputs of all tokens, for the slice of K that starts at `first`."""
    padded, n = _padded(a[K_STEPS], a[BITS]), a[N]
    size, w = min(_depth(padded, a[BITS], tokens), padded - first), _scratch(a, tokens, thread)
    ws, tile, scales = at(float32, w + W_BYTES), w + W_BYTES + ROW_BYTES, _scales(a)
    for c in range(COLUMNS):  # an odd panel at the end is taken twice and stored once
        panel = min(strip * COLUMNS + c, (n - 1) // 16)
        for i in range(16):
            ws[c * 16 + i] = scales[panel * 16 + i]
        if a[BITS] == 2:
            unpack_codes(at(uint8, a[CODES]), (panel * padded + first) * 4, size, 2, at(uint8, w), c * 64)
        else:
            unpack_trits(at(uint8, a[CODES]), (panel * padded + first) // 20 * 64, size, at(uint8, w), c * 64)
    scratch = at(uint8, w), ws, ws, at(float32, tile), at(float32, tile + TILE_BYTES)
    sweep_tokens(_activations(a, tokens, first), at(float32, a[BIAS]), at(float32, a[OUT]), scratch, strip, 2,
                 (0, 1, size // 4, tokens, n, a[OUT_STRIDE]), (False, a[BIAS] != 0, first == 0))


@njit(nogil=True, error_model="numpy")
def _run(a, address, tokens):
    panels, threads, padded = (a[N] + 15) // 16, thread_count(), _padded(a[K_STEPS], a[BITS])
    depth = _depth(padded, a[BITS], tokens)
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
