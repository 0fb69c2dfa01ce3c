"""Many tokens times block-quantised weights, and the choice between this and gemv_nbits.

A task is a strip of one or two panels and a slice of K: it unpacks their codes to bytes that stay in the first-level cache,
then sweeps every token over them in register tiles of ROWS tokens.
"""
import numpy as np
from numba import njit

from edgeattn.kernels_cpu import LEVEL
from edgeattn.kernels_cpu.gemv_nbits import AHEAD, FEW, GROUPED, NO_ZEROS, ZERO_BYTES
from edgeattn.kernels_cpu.parallel import for_tasks, parallel, variant
from edgeattn.kernels_cpu.simd import (MACHINE, codes8, f32, half_zero_scales, i32, load, load_half_tile, load_tile, prefetch, store, u8,
                                       zero_scales)
from edgeattn.kernels_cpu.simd_bits import trit

if LEVEL == "i8mm":
    from edgeattn.kernels_cpu.simd_pairs import broadcast_rows, load_rows, outer_add, outer_dot, outer_fma, store_steps, store_tile
    outer_dot8 = outer_dot
else:
    from edgeattn.kernels_cpu.simd import broadcast_rows, load_rows, outer_add, outer_dot, outer_dot8, outer_fma, store_steps, store_tile

ROWS = 6      # tokens of a register tile
SLICE = 1024  # K unpacked at a time, at least a block
LANES, COLUMNS = {"avx512": (16, 2), "avxvnni": (8, 1), "avx2": (8, 1), "neon": (8, 1), "plain": (4, 1)}[MACHINE]
STEPS = 2 if LEVEL == "i8mm" else 1  # of 4 K, that one dot product takes
F, F16, I, U, U64 = f32(LANES), f32(16), i32(LANES), u8(4 * LANES * STEPS), u8(64)
SPAN = LANES * COLUMNS
SERIAL_INPUTS = 1 << 14  # activations that one thread rounds sooner than a parallel region starts


@njit(nogil=True, error_model="numpy")
def tile_rows(tokens):
    """How many tokens' activations are interleaved."""
    return 1 if tokens == 1 else FEW if tokens <= GROUPED else ROWS


@njit(nogil=True, error_model="numpy")
def multiply(workers, address, tokens, sizes, gemv_tasks):
    """Run the workers (quantise, gemv, gemm) of a product on the row of arguments at `address`: sizes (K, units of K, units in a slice
    of K, panels); gemv_tasks, how many."""
    quantise, gemv, gemm = workers
    k, units, depth, panels = sizes
    groups = (tokens + tile_rows(tokens) - 1) // tile_rows(tokens)
    for_tasks(quantise, address, tokens, depth, groups, tokens * k > SERIAL_INPUTS)
    if tokens <= GROUPED:
        for_tasks(gemv, address, tokens, gemv_tasks, gemv_tasks, True)
        return
    for first in range(0, units, depth):  # slices of K outermost: that of the activations stays in the second-level cache
        parallel(gemm, address, tokens, first, (panels + COLUMNS - 1) // COLUMNS)


@njit(nogil=True, error_model="numpy")
def unpack_codes(codes, at, size, bits, w, to):
    """A block of `size` K of one panel, whose codes start at `at`: bytes w[step, column, 64] from `to` on, in the order in which
    quantise_row puts activations."""
    packed, step = size * (2 if bits == 3 else bits) // 32, COLUMNS * 64
    apart = packed * step  # from the codes of one phase to those of the next
    if packed == 1:  # 2 bits, blocks of 16: a step of each phase
        u = load(U64, codes, at)
        store_steps(w, to, step, u & 3, (u >> 2) & 3)
        store_steps(w, to + 2 * step, step, (u >> 4) & 3, u >> 6)
    for s in range(0, packed - 1, 2):
        source, target = at + s * 64, to + s * step
        prefetch(codes, source + AHEAD)
        prefetch(codes, source + AHEAD + 64)
        u, v = load(U64, codes, source), load(U64, codes, source + 64)
        if bits == 2:
            store_steps(w, target, step, u & 3, v & 3)
            store_steps(w, target + apart, step, (u >> 2) & 3, (v >> 2) & 3)
            store_steps(w, target + 2 * apart, step, (u >> 4) & 3, (v >> 4) & 3)
            store_steps(w, target + 3 * apart, step, u >> 6, v >> 6)
        elif bits == 3:
            h = load(U64, codes, at + (packed + s // 2) * 64)
            store_steps(w, target, step, (u & 3) | ((h << 2) & 4), (v & 3) | ((h >> 2) & 4))
            store_steps(w, target + apart, step, ((u >> 2) & 3) | ((h << 1) & 4), ((v >> 2) & 3) | ((h >> 3) & 4))
            store_steps(w, target + 2 * apart, step, ((u >> 4) & 3) | (h & 4), ((v >> 4) & 3) | ((h >> 4) & 4))
            store_steps(w, target + 3 * apart, step, (u >> 6) | ((h >> 1) & 4), (v >> 6) | ((h >> 5) & 4))
        elif bits == 4:
            store_steps(w, target, step, u & 15, v & 15)
            store_steps(w, target + apart, step, u >> 4, v >> 4)
        else:
            store_steps(w, target, step, codes8(u), codes8(v))


@njit(nogil=True, error_model="numpy")
def unpack_trits(codes, at, size, w, to):
    """unpack_codes for five ternary digits to a byte; `size` is a multiple of 40."""
    step = COLUMNS * 64
    for s in range(0, size // 20, 2):
        prefetch(codes, at + s * 64 + AHEAD)
        prefetch(codes, at + s * 64 + 64 + AHEAD)
        u, v, target = load(U64, codes, at + s * 64), load(U64, codes, at + s * 64 + 64), to + s * 5 * step
        u1, v1 = u + u + u, v + v + v
        u2, v2 = u1 + u1 + u1, v1 + v1 + v1
        u3, v3 = u2 + u2 + u2, v2 + v2 + v2
        store_steps(w, target, step, trit(u), trit(u1))
        store_steps(w, target + 2 * step, step, trit(u2), trit(u3))
        store_steps(w, target + 4 * step, step, trit(u3 + u3 + u3), trit(v))
        store_steps(w, target + 6 * step, step, trit(v1), trit(v2))
        store_steps(w, target + 8 * step, step, trit(v3), trit(v3 + v3 + v3))


@njit(nogil=True, error_model="numpy")
def unpack(codes, scales, zero_points, zeros_are, bits, source, blocks, size, column, w, ws, wz):
    """`blocks` blocks of one panel from block `source` on: bytes w[block, step, column, 64], f32 ws and wz[block, column, 16]."""
    zero = np.float32(1 << (bits - 1))
    for b in range(blocks):
        to, at = (b * COLUMNS + column) * 16, (source + b) * 16
        scale = load_half_tile(F16, 1, scales, at, 0)
        store(ws, to, scale[0])
        if zeros_are == ZERO_BYTES:
            store(wz, to, zero_scales(scale, zero_points, at, 0, zero)[0])
        elif zeros_are != NO_ZEROS:
            store(wz, to, half_zero_scales(scale, zero_points, 2 * at, 0, zero)[0])
        unpack_codes(codes, (source + b) * size * bits * 2, size, bits, w, (b * size // 4 * COLUMNS + column) * 64)


def _build(dot, bits):
    @variant(bits)
    def sweep(weights, activations, unit, blocks, steps, part, has_zeros, start, out, to, stride):
        """A tile of ROWS tokens, whose activations begin with unit `unit` (a unit is a block of a tile), x LANES * COLUMNS outputs
        from `part` of the strip on: added to what `start` holds from `to` on, `stride` (0 for a bias) from one row to the next."""
        w, ws, wz = weights
        a, a_scales, starts, sums = activations
        total = load_rows(F, ROWS, COLUMNS, start[0], start[1], start[2], LANES)
        for b in range(blocks):
            row = (unit + b) * ROWS
            acc = broadcast_rows(I, ROWS, COLUMNS, starts, row)
            for s in range(0, steps, STEPS):  # a run-time count: unrolled by LLVM this loop spills
                v = load_tile(U, COLUMNS, w, (b * steps + s) * 64 * COLUMNS + 4 * STEPS * part, 64)
                acc = dot(acc, v, a, (row * steps + s * ROWS) * 4)
            total = outer_fma(total, acc, load_tile(F, COLUMNS, ws, b * 16 * COLUMNS + part, 16), a_scales, row)
            if has_zeros:
                total = outer_add(total, load_tile(F, COLUMNS, wz, b * 16 * COLUMNS + part, 16), sums, row)
        store_tile(out, to, stride, LANES, COLUMNS, total)
    return sweep


sweep4 = _build(outer_dot, 4)
sweep8 = _build(outer_dot8, 8) if MACHINE == "avx2" else sweep4  # elsewhere one dot product serves both


@njit(nogil=True, error_model="numpy")
def gemm_strip(weights, activations, bias, out, scratch, strip, bits, sizes, flags):
    """Blocks [first, first + count) of K of every token, into the outputs of one strip: added, but for the first slice.

    Arguments as gemv's (gemv_nbits.build), but sizes (block size, blocks, first, count, tokens, N, stride of out) and scratch (w, ws,
    wz, tile, starts): see unpack.
    """
    size, blocks, first, count, tokens, n, out_stride = sizes
    for c in range(COLUMNS):  # an odd panel at the end is taken twice and stored once
        panel = min(strip * COLUMNS + c, (n - 1) // 16)
        unpack(weights[0], weights[1], weights[2], flags[0], bits, panel * blocks + first, count, size, c, scratch[0], scratch[1],
               scratch[2])
    groups = (tokens + ROWS - 1) // ROWS
    sweep_tokens(activations, bias, out, scratch, strip, bits, (first * groups, count, size // 4, tokens, n, out_stride),
                 (flags[0] != NO_ZEROS, flags[1], first == 0))


@njit(nogil=True, error_model="numpy")
def sweep_tokens(activations, bias, out, scratch, strip, bits, sizes, flags):
    """Every token over the unpacked weights of a strip, `count` blocks of `steps`: sizes (the first block's unit of activations, count,
    steps, tokens, N, stride of out), flags (has zero points, has bias, whether these are the first of K)."""
    first_unit, count, steps, tokens, n, out_stride = sizes
    has_zeros, has_bias, begin = flags
    w, ws, wz, tile, starts = scratch
    groups, column = (tokens + ROWS - 1) // ROWS, strip * COLUMNS * 16
    for i in range(COLUMNS * 16):
        starts[i] = bias[column + i] if has_bias and column + i < n else np.float32(0)
    for part in range(0, 16, LANES):
        wide = n - column - part  # outputs there are
        for group in range(groups):
            unit, to, rows = first_unit + group * count, group * ROWS * out_stride + column + part, min(ROWS, tokens - group * ROWS)
            whole = rows == ROWS and wide >= SPAN
            target, at, stride = (out, to, out_stride) if whole else (tile, 0, SPAN)
            if not begin and not whole:
                copy(out, to, out_stride, tile, 0, SPAN, rows, min(wide, SPAN))
            start = (starts, part, 0) if begin else (target, at, stride)
            for r in range(rows):  # the rows of out are far apart: fetch the lines while the tile is computed
                for c in range(0, SPAN, 16):
                    prefetch(out, to + r * out_stride + c)
            if bits == 8:
                sweep8((w, ws, wz), activations, unit, count, steps, part, has_zeros, start, target, at, stride)
            else:
                sweep4((w, ws, wz), activations, unit, count, steps, part, has_zeros, start, target, at, stride)
            if not whole:
                copy(tile, 0, SPAN, out, to, out_stride, rows, min(wide, SPAN))


@njit(nogil=True, error_model="numpy")
def copy(source, at, stride, out, to, out_stride, rows, columns):
    """A rectangle of floats; nothing when columns < 1."""
    for r in range(rows):
        for c in range(columns):
            out[to + r * out_stride + c] = source[at + r * stride + c]
