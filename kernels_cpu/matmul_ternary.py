"""x, rounded to integers per token, times ternary weights: see the reference for layouts.

As one scale holds for all of a token, and one for all of an output, sums of integers run over all of K: what matmul_nbits does
for a block is done here for a whole row of up to GROUPED tokens, and for a slice of K when there are more.
"""
import numpy as np
from numba import carray, cfunc, float32, int8, int32, njit, uint8

from edgeattn.kernels_cpu import simd
from edgeattn.kernels_cpu.gemm_nbits import COLUMNS, ROWS, STEPS, multiply, sweep_tokens, tile_rows, unpack_codes, unpack_trits
from edgeattn.kernels_cpu.gemv_nbits import FEW, GROUPED, NO_ZEROS, SHAPES, build
from edgeattn.kernels_cpu.parallel import worker
from edgeattn.kernels_cpu.quantise_tokens import clear_token, quantise_token
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.simd_bits import WORDS
from edgeattn.kernels_cpu.steps import STEP, aligned, call, thread_count
from edgeattn.kernels_cpu.ternary_inputs import TILE, list_bytes_of, list_inputs, tile_sums, unpack_inputs

ARGS = ("x", "x.rows", "x.stride", "codes", "codes.1", "scales", "bias", "out", "out.stride", "bits", "activation_bits", "K", "N",
        "workspace", "input_major")
(X, TOKENS, X_STRIDE, CODES, K_STEPS, SCALES, BIAS, OUT, OUT_STRIDE, BITS, ACTIVATION_BITS, K, N, WORKSPACE,
 INPUT_MAJOR) = range(len(ARGS))
INPUTS = 3              # besides bits 1 and 2: a form of weights, input by input
BIAS_BITS = np.int32(simd.BIAS)
SLICE = 1024            # of K in a strip of unpacked weights, at most
SERIAL_BYTES = 1 << 17  # weights that one thread reads sooner than a parallel region starts
# A thread's scratch: unpacked codes, their scales, a tile of results, starts.
W_BYTES, ROW_BYTES, TILE_BYTES = SLICE * 16 * COLUMNS, 4 * 16 * COLUMNS, 4 * FEW * 16 * 8
STRIP_BYTES = W_BYTES + 2 * ROW_BYTES + TILE_BYTES

gemv_1_2, gemv_1_1 = (build(1, *SHAPES[0], bits, False) for bits in (2, 1))
gemv_few_2, gemv_few_1 = (build(FEW, *SHAPES[1], bits, False) for bits in (2, 1))


def matmul_ternary(x, codes, scales, bias=None, *, bits, activation_bits, K, N, input_major=0):
    out = aligned((len(x), N), np.float32)
    call(step, ARGS, dict(x=x, codes=codes, scales=scales, bias=bias, out=out),
         dict(bits=bits, activation_bits=activation_bits, K=K, N=N, input_major=input_major), workspace_bytes=workspace_bytes)
    return out


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Scales of whole panels, integers of the tokens, then scratch of the threads."""
    form = INPUTS if attributes.get("input_major") else attributes["bits"]
    padded, rows = _padded.py_func(tensors["codes"].shape[1], form), max(rows, GROUPED + 1)
    ends = [_places.py_func(tokens, padded, attributes["N"], form)[-1] for tokens in (GROUPED, rows)]
    return max(ends) + (STRIP_BYTES + _token_bytes.py_func(padded)) * threads


@njit(nogil=True, error_model="numpy")
def _form(a):
    return INPUTS if a[INPUT_MAJOR] else a[BITS]


@njit(nogil=True, error_model="numpy")
def _padded(steps, form):
    """K, filled up to whole steps, as the weights are."""
    return steps if form == INPUTS else steps * (20 if form == 1 else 16)


@njit(nogil=True, error_model="numpy")
def _unit(form):
    """What slices of K are a multiple of: of steps of weights, and of the 16 floats that quantise_slice takes at a time."""
    return 16 if form == INPUTS else 80 if form == 1 else 128


@njit(nogil=True, error_model="numpy")
def _token_bytes(padded):
    """Scratch of quantise_token."""
    return (192 + padded + padded // 20 * 4 * WORDS) // 64 * 64


@njit(nogil=True, error_model="numpy")
def _places(tokens, padded, n, form):
    """Where in the workspace the tokens' codes (or lists), their scales and starts begin (the weights' scales do at 0), and the end."""
    tile, per_token = tile_rows(tokens), padded
    rows = (tokens + tile - 1) // tile * tile
    if tokens <= GROUPED and form != 2:
        per_token = list_bytes_of(padded) if form == INPUTS else padded // 20 * 4 * WORDS
    codes = (n + 15) // 16 * 64
    scales = codes + (rows * per_token + 63) // 64 * 64
    floats = (rows * ((padded + _unit(form) - 1) // _unit(form)) * 4 + 63) // 64 * 64
    return codes, scales, scales + floats, scales + 2 * floats


@njit(nogil=True, error_model="numpy")
def _depth(padded, form, tokens):
    """K of a slice: all of it for few tokens, else equal parts of at most SLICE."""
    if tokens <= GROUPED:
        return padded
    unit = _unit(form)
    slices = (padded + SLICE // unit * unit - 1) // (SLICE // unit * unit)
    return ((padded + unit - 1) // unit + slices - 1) // slices * unit


@njit(nogil=True, error_model="numpy")
def _activations(a, tokens, first):
    """Codes, scales, starts of the tokens (quantise_token), of the slice of K that starts at `first`; in place of sums, which only zero
    points need, anything."""
    form = _form(a)
    padded = _padded(a[K_STEPS], form)
    codes, scales, starts, _ = _places(tokens, padded, a[N], form)
    base, rows = a[WORKSPACE], (tokens + ROWS - 1) // ROWS * ROWS  # `first` is 0 where tiles are smaller
    later = first // _depth(padded, form, tokens) * rows * 4
    return (at(int8, base + codes + first * rows), at(float32, base + scales + later), at(int32, base + starts + later),
            at(float32, base + scales))


@njit(nogil=True, error_model="numpy")
def _scales(a):
    """Whole panels of scales: a copy where the last panel is not whole."""
    return at(float32, a[SCALES] if a[N] % 16 == 0 else a[WORKSPACE])


@njit(nogil=True, error_model="numpy")
def _scratch(a, tokens, thread):
    """Address of a thread's scratch; that of quantise_token begins STRIP_BYTES further."""
    form = _form(a)
    padded = _padded(a[K_STEPS], form)
    return a[WORKSPACE] + _places(tokens, padded, a[N], form)[3] + (STRIP_BYTES + _token_bytes(padded)) * thread


@worker
def quantise(a, tokens, depth, group, thread):
    """Tile `group` of tokens."""
    form, tile = _form(a), tile_rows(tokens)
    padded = _padded(a[K_STEPS], form)
    _, scales, starts, _ = _activations(a, tokens, 0)
    place, scratch = a[WORKSPACE] + _places(tokens, padded, a[N], form)[0], _scratch(a, tokens, thread) + STRIP_BYTES
    groups, together = (tokens + tile - 1) // tile, STEPS if tile == ROWS else 1
    for row in range(tile):
        token = group * tile + row
        if token >= tokens:
            clear_token(padded, depth, scales, tile, group, groups, row)
        elif form == INPUTS and tokens <= GROUPED:
            list_inputs(at(float32, a[X]), token * a[X_STRIDE], a[K], padded, a[ACTIVATION_BITS], scales, starts, token,
                        place + token * list_bytes_of(padded), scratch)
        else:
            quantise_token(at(float32, a[X]), token * a[X_STRIDE], a[K], padded, depth, form, a[ACTIVATION_BITS], at(int32, place), scales,
                           starts, tile, together, group, groups, row, scratch, form == 1 and tokens <= GROUPED)


@worker
def gemv(a, tokens, parts, part, thread):
    """One of `parts` shares of the panels, for up to GROUPED tokens."""
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
def gemv_inputs(a, tokens, _, tile, thread):
    """A tile of outputs of up to GROUPED tokens, by the inputs that are not zero."""
    padded, first, bias, out, weight_scales = a[K_STEPS], tile * TILE, at(float32, a[BIAS]), at(float32, a[OUT]), at(float32, a[SCALES])
    _, scales, starts, _ = _activations(a, tokens, 0)
    place, sums = a[WORKSPACE] + _places(tokens, padded, a[N], INPUTS)[0], at(int32, _scratch(a, tokens, thread))
    for token in range(tokens):
        tile_sums(at(uint8, a[CODES]), tile * padded * 64, padded, place + token * list_bytes_of(padded), sums)
        for i in range(min(TILE, a[N] - first)):
            value = np.float32(sums[i] + (starts[token] - BIAS_BITS)) * weight_scales[first + i] * scales[token]
            out[token * a[OUT_STRIDE] + first + i] = value + (bias[first + i] if a[BIAS] else np.float32(0))


@worker
def gemm(a, tokens, first, strip, thread):
    """One strip of outputs of all tokens, for the slice of K that starts at `first`."""
    form, n = _form(a), a[N]
    padded = _padded(a[K_STEPS], form)
    size, w = min(_depth(padded, form, tokens), padded - first), _scratch(a, tokens, thread)
    ws, tile, scales = at(float32, w + W_BYTES), w + W_BYTES + ROW_BYTES, _scales(a)
    for c in range(COLUMNS):  # an odd panel at the end is taken twice and stored once
        panel = min(strip * COLUMNS + c, (n - 1) // 16)
        for i in range(16):
            ws[c * 16 + i] = scales[panel * 16 + i]
        if form == INPUTS:
            unpack_inputs(at(uint8, a[CODES]), (panel // 16 * padded + first) * 64, size, panel % 16, at(uint8, w), c * 64)
        elif form == 2:
            unpack_codes(at(uint8, a[CODES]), (panel * padded + first) * 4, size, 2, at(uint8, w), c * 64)
        else:
            unpack_trits(at(uint8, a[CODES]), (panel * padded + first) // 20 * 64, size, at(uint8, w), c * 64)
    scratch = at(uint8, w), ws, ws, at(float32, tile), at(float32, tile + TILE_BYTES)
    sweep_tokens(_activations(a, tokens, first), at(float32, a[BIAS]), at(float32, a[OUT]), scratch, strip, 2,
                 (0, 1, size // 4, tokens, n, a[OUT_STRIDE]), (False, a[BIAS] != 0, first == 0))


@njit(nogil=True, error_model="numpy")
def _run(a, address, tokens):
    form, panels = _form(a), (a[N] + 15) // 16
    padded = _padded(a[K_STEPS], form)
    if a[N] % 16:
        given, whole = at(float32, a[SCALES]), at(float32, a[WORKSPACE])
        for i in range(panels * 16):
            whole[i] = given[i] if i < a[N] else np.float32(0)
    few, shares = gemv(), thread_count() if padded * a[N] // 4 * (tokens + FEW - 1) // FEW > SERIAL_BYTES else 1
    if form == INPUTS:
        few, shares = gemv_inputs(), (a[N] + TILE - 1) // TILE
    multiply((quantise(), few, gemm()), address, tokens, (padded, padded, _depth(padded, form, tokens), panels), shares)


@cfunc(STEP, cache=True)
def step(a, state):
    if state[a[TOKENS]] > 0:
        _run(a, carray(a, 1).ctypes.data, state[a[TOKENS]])
