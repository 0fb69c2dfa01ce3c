"""Few tokens times block-quantised weights: codes are unpacked in registers, so that memory is the limit.

Up to FEW tokens share what is unpacked. More pass over a panel in groups of FEW, one after another, while it is in the cache; each group
fetches a share of the next panel.

A thread walks its panels as `streams` parallel sequences, each prefetched: two reach more of the bandwidth than one.
Outputs are the lanes, so nothing is summed across a vector.
"""
import numpy as np

from edgeattn.kernels_cpu.parallel import variant
from edgeattn.kernels_cpu.simd import (MACHINE, broadcast_rows, byte_dots, f32, half_zero_scales, i32, load, load_half_tile, load_tile,
                                       outer_add, outer_fma, packed_dots, prefetch, store, store_tile, zero_scales, zeros)
from edgeattn.kernels_cpu.simd_bits import WORDS, quarter_dots, three_bit_dots, trit_dots, trit_totals

FEW = 4       # tokens of the wider variant
GROUPED = 16  # tokens up to which groups of them cost less than unpacking weights to memory (gemm_nbits) does
AHEAD = 3072  # bytes prefetched ahead in each stream
NO_ZEROS, ZERO_BYTES, ZERO_HALVES = range(3)  # which zero points weights have: none, uint8, float16
SHAPES = {  # (lanes, streams) for 1 token and for FEW: what fits the registers
    "avx512": ((16, 2), (16, 1)), "avxvnni": ((16, 1), (8, 1)), "avx2": ((16, 1), (8, 1)), "neon": ((16, 1), (8, 1)),
    "plain": ((8, 1), (4, 1)),
}[MACHINE]


def _build_put(lanes):
    """put(tile, at, out, to, n, bias, bias_at): a vector of results at tile[at] to out[to], or its first n when n < lanes, plus the bias
    when its index is not negative."""
    F = f32(lanes)

    @variant(lanes)
    def put(tile, at, out, to, n, bias, bias_at):
        if n >= lanes:
            value = load(F, tile, at)
            if bias_at >= 0:
                value += load(F, bias, bias_at)
            store(out, to, value)
        else:
            for i in range(n):
                out[to + i] = tile[at + i] + bias[bias_at + i] if bias_at >= 0 else tile[at + i]
    return put


def _build_dots(rows, lanes, streams, bits):
    """dots(acc, codes, at, gap, a, first, size, ahead): acc plus the products of one block of `size`, whose codes start at `at` (the second
    stream's `gap` later) and activations at a[first]; prefetches so far ahead. 1 bit stands for five ternary digits to a byte."""
    I = i32(lanes)

    @variant(rows, lanes, streams, bits, forceinline=True)
    def fetch(codes, at, gap, lines, ahead):
        for line in range(lines):
            for s in range(streams):
                prefetch(codes, at + s * gap + 64 * line + ahead)

    @variant(rows, lanes, streams, bits, forceinline=True)
    def dots4(acc, codes, at, gap, a, first, size, ahead):
        odds = first + size // 2 * rows
        for q in range(size // 32):  # once for blocks of 32; for those of 16 below
            fetch(codes, at + 256 * q, gap, 4, ahead)
            acc = packed_dots(acc, streams, 4, codes, at + 256 * q, gap, a, first + 16 * rows * q, odds + 16 * rows * q)
        if size == 16:
            fetch(codes, at, gap, 2, ahead)
            acc = packed_dots(acc, streams, 2, codes, at, gap, a, first, odds)
        return acc

    @variant(rows, lanes, streams, bits, forceinline=True)
    def dots8(acc, codes, at, gap, a, first, size, ahead):
        for q in range(size // 16):
            fetch(codes, at + 256 * q, gap, 4, ahead)
            acc = byte_dots(acc, streams, 4, codes, at + 256 * q, gap, a, first + 16 * rows * q)
        return acc

    @variant(rows, lanes, streams, bits, forceinline=True)
    def dots2(acc, codes, at, gap, a, first, size, ahead):
        apart = size // 4 * rows
        for q in range(size // 64):
            fetch(codes, at + 256 * q, gap, 4, ahead)
            acc = quarter_dots(acc, streams, 4, codes, at + 256 * q, 0, gap, a, first + 16 * rows * q, apart)
        if size == 32:
            fetch(codes, at, gap, 2, ahead)
            acc = quarter_dots(acc, streams, 2, codes, at, 0, gap, a, first, apart)
        elif size == 16:
            fetch(codes, at, gap, 1, ahead)
            acc = quarter_dots(acc, streams, 1, codes, at, 0, gap, a, first, apart)
        return acc

    @variant(rows, lanes, streams, bits, forceinline=True)
    def dots3(acc, codes, at, gap, a, first, size, ahead):
        high, apart = at + 4 * size, size // 4 * rows
        for q in range(size // 64):
            fetch(codes, at + 256 * q, gap, 4, ahead)
            fetch(codes, high + 128 * q, gap, 2, ahead)
            acc = three_bit_dots(acc, streams, 4, codes, at + 256 * q, high + 128 * q, gap, a, first + 16 * rows * q, apart)
        if size == 32:
            fetch(codes, at, gap, 3, ahead)
            acc = three_bit_dots(acc, streams, 2, codes, at, high, gap, a, first, apart)
        return acc

    chains = 3 if rows == 1 else 1
    count = 2 * chains * rows * streams

    @variant(rows, lanes, streams, bits, forceinline=True)
    def dots_trits(acc, codes, at, gap, a, first, size, ahead):
        total = zeros(I, count)
        for q in range(size // 40):
            fetch(codes, at + 128 * q, gap, 2, ahead)
            total = trit_dots(total, chains, streams, 2, codes, at + 128 * q, gap, a, first + 8 * WORDS * rows * q)
        return trit_totals(total, acc, chains)
    return {1: dots_trits, 2: dots2, 3: dots3, 4: dots4, 8: dots8}[bits]


def _build_scales(lanes, streams, halves):
    F = f32(lanes)

    @variant(lanes, streams, halves, forceinline=True)
    def from_halves(scales, at, gap):
        prefetch(scales, at + AHEAD // 16)
        if streams > 1:
            prefetch(scales, at + gap + AHEAD // 16)
        return load_half_tile(F, streams, scales, at, gap)

    @variant(lanes, streams, halves, forceinline=True)
    def from_floats(scales, at, gap):
        return load_tile(F, streams, scales, at, gap)
    return from_halves if halves else from_floats


def _build_outputs(rows, lanes, streams, bits, halves):
    F, I, load_scales = f32(lanes), i32(lanes), _build_scales(lanes, streams, halves)
    count, zero, dots = rows * streams, np.float32(1 << (bits - 1)), _build_dots(rows, lanes, streams, bits)
    per_token = 20, 4 * WORDS  # of how much of K, how many bytes of activations
    if bits != 1:
        per_token = 1, 1

    @variant(rows, lanes, streams, bits, halves)
    def outputs(weights, activations, size, blocks, zeros_are, panel, gap, part, group, turn, turns):
        """`lanes` outputs, from `part` on, of `panel` (and of `panel + gap`), for a group of tokens: a tile of rows x streams.

        It is one of several `turns` on this panel. Each fetches its share of the blocks of the next one, so that memory never waits.
        """
        codes, scales, zero_points = weights
        a, a_scales, starts, sums = activations
        total, block_bytes = zeros(F, count), size // 20 * 64 if bits == 1 else size * bits * 2
        far = AHEAD if turns == 1 else blocks * block_bytes
        for b in range(blocks):
            block, apart, row = panel * blocks + b, gap * blocks, (group * blocks + b) * rows
            ahead = far if turn == 0 else 0
            turn = turns - 1 if turn == 0 else turn - 1
            acc = broadcast_rows(I, rows, streams, starts, row)
            acc = dots(acc, codes, block * block_bytes + 4 * part, apart * block_bytes, a,
                       row * (size // per_token[0] * per_token[1]), size, ahead)
            scale = load_scales(scales, block * 16 + part, apart * 16)
            total = outer_fma(total, acc, scale, a_scales, row)
            if zeros_are == ZERO_BYTES:
                total = outer_add(total, zero_scales(scale, zero_points, block * 16 + part, apart * 16, zero), sums, row)
            elif zeros_are == ZERO_HALVES:
                column = half_zero_scales(scale, zero_points, 2 * (block * 16 + part), 2 * apart * 16, zero)
                total = outer_add(total, column, sums, row)
        return total
    return outputs


def build(rows, lanes, streams, bits, halves=True):
    """gemv(weights, activations, bias, out, tile, sizes, flags) for tokens whose activations lie in tiles of `rows`.

    weights (codes, scales, which `halves` says are float16, zero points); activations (codes, scales, starts, sums); tile is scratch;
    sizes (block size, blocks, first panel, last panel + 1, tokens, N, elements from one row of out to the next); flags (which zero points,
    has bias).
    """
    outputs, put = _build_outputs(rows, lanes, streams, bits, halves), _build_put(lanes)

    @variant(rows, lanes, streams, bits, halves)
    def gemv(weights, activations, bias, out, tile, sizes, flags):
        size, blocks, first, last, tokens, n, out_stride = sizes
        zeros_are, has_bias = flags
        pairs, groups = (last - first) // streams, (tokens + rows - 1) // rows
        turns = 1 if groups == 1 else groups * (16 // lanes)
        for i in range((last - first + streams - 1) // streams):
            panel, gap = first + i, pairs
            if i == pairs:  # an odd one at the end goes with itself
                panel, gap = last - 1, 0
            for part in range(0, 16, lanes):
                for group in range(groups):
                    turn = 0 if groups == 1 else part // lanes * groups + group
                    store_tile(tile, 0, lanes * streams, lanes, streams,
                               outputs(weights, activations, size, blocks, zeros_are, panel, gap, part, group, turn, turns))
                    for r in range(min(rows, tokens - group * rows)):
                        for s in range(streams):
                            column = (panel + s * gap) * 16 + part
                            put(tile, (r * streams + s) * lanes, out, (group * rows + r) * out_stride + column, n - column, bias,
                                column if has_bias else -1)
    return gemv


gemv_1_2, gemv_1_3, gemv_1_4, gemv_1_8 = (build(1, *SHAPES[0], bits) for bits in (2, 3, 4, 8))
gemv_few_2, gemv_few_3, gemv_few_4, gemv_few_8 = (build(FEW, *SHAPES[1], bits) for bits in (2, 3, 4, 8))
