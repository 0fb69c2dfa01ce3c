"""Many tokens times block-quantised weights.

A task is a strip of one or two panels and a slice of K: it unpacks their codes to bytes that stay in the first-level cache,
then sweeps every token over them in register tiles of ROWS tokens.
"""
import numpy as np
from numba import njit

from edgeattn.kernels_cpu import LEVEL
from edgeattn.kernels_cpu.gemv_nbits import AHEAD
from edgeattn.kernels_cpu.parallel import variant
from edgeattn.kernels_cpu.simd import MACHINE, codes8, f32, i32, load, load_half_tile, load_tile, prefetch, store, u8, zero_scales

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


@njit(nogil=True, error_model="numpy")
def unpack(codes, scales, zero_points, has_zeros, bits, source, blocks, size, column, w, ws, wz):
    """`blocks` blocks of one panel from block `source` on: bytes w[block, step, column, 64], f32 ws and wz[block, column, 16]."""
    packed, steps = size * bits // 32, size // 4
    zero = np.float32(8 if bits == 4 else 128)
    for b in range(blocks):
        to = (b * COLUMNS + column) * 16
        scale = load_half_tile(F16, 1, scales, (source + b) * 16, 0)
        store(ws, to, scale[0])
        if has_zeros:
            store(wz, to, zero_scales(scale, zero_points, (source + b) * 16, 0, zero)[0])
        for s in range(0, packed, 2):
            at, to = ((source + b) * packed + s) * 64, ((b * steps + s) * COLUMNS + column) * 64
            prefetch(codes, at + AHEAD)
            prefetch(codes, at + AHEAD + 64)
            u, v = load(U64, codes, at), load(U64, codes, at + 64)
            if bits == 4:
                store_steps(w, to, COLUMNS * 64, u & 15, v & 15)
                store_steps(w, to + packed * COLUMNS * 64, COLUMNS * 64, u >> 4, v >> 4)
            else:
                store_steps(w, to, COLUMNS * 64, codes8(u), codes8(v))


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
    wz, tile): see unpack.
    """
    size, blocks, first, count, tokens, n, out_stride = sizes
    has_zeros, has_bias = flags
    w, ws, wz, tile, starts = scratch
    groups, column = (tokens + ROWS - 1) // ROWS, strip * COLUMNS * 16
    for c in range(COLUMNS):  # an odd panel at the end is taken twice and stored once
        panel = min(strip * COLUMNS + c, (n - 1) // 16)
        unpack(weights[0], weights[1], weights[2], has_zeros, bits, panel * blocks + first, count, size, c, w, ws, wz)
    for i in range(COLUMNS * 16):
        starts[i] = bias[column + i] if has_bias and column + i < n else np.float32(0)
    for part in range(0, 16, LANES):
        wide = n - column - part  # outputs there are
        for group in range(groups):
            unit, to, rows = first * groups + group * count, group * ROWS * out_stride + column + part, min(ROWS, tokens - group * ROWS)
            whole = rows == ROWS and wide >= SPAN
            target, at, stride = (out, to, out_stride) if whole else (tile, 0, SPAN)
            if first and not whole:
                copy(out, to, out_stride, tile, 0, SPAN, rows, min(wide, SPAN))
            start = (target, at, stride) if first else (starts, part, 0)
            for r in range(rows):  # the rows of out are far apart: fetch the lines while the tile is computed
                for c in range(0, SPAN, 16):
                    prefetch(out, to + r * out_stride + c)
            if bits == 4:
                sweep4((w, ws, wz), activations, unit, count, size // 4, part, has_zeros, start, target, at, stride)
            else:
                sweep8((w, ws, wz), activations, unit, count, size // 4, part, has_zeros, start, target, at, stride)
            if not whole:
                copy(tile, 0, SPAN, out, to, out_stride, rows, min(wide, SPAN))


@njit(nogil=True, error_model="numpy")
def copy(source, at, stride, out, to, out_stride, rows, columns):
    """A rectangle of floats; nothing when columns < 1."""
    for r in range(rows):
        for c in range(columns):
            out[to + r * out_stride + c] = source[at + r * stride + c]
