"""Ternary weights stored input by input, of which one token reads only those of inputs that are not zero.

What follows squared ReLU is zero exactly, mostly four times in five. 256 outputs are a tile: 64 bytes an input, one cache line. Four
inputs that are not zero, wherever they are, make one dot product: their bytes are interleaved in registers.
"""
import numpy as np
from llvmlite import ir
from numba import int8, int32, njit, types
from numba.extending import intrinsic

from edgeattn.kernels_cpu import simd_emit as emit
from edgeattn.kernels_cpu.gemm_nbits import COLUMNS, store_steps
from edgeattn.kernels_cpu.parallel import variant
from edgeattn.kernels_cpu.quantise_tokens import factor_of, quantise_slice
from edgeattn.kernels_cpu.simd import BIAS, MACHINE, Vec, _address, _count, _pack, _unpack, at, i32, prefetch, store_tile, u8, zeros
from edgeattn.kernels_cpu.simd_emit import I8

TILE = 256   # outputs
AHEAD = 64   # inputs that are not zero by which their weights are fetched before they are used
LANES, QUARTERS = {"avx512": (16, 4), "avxvnni": (8, 2), "avx2": (8, 2), "neon": (4, 4), "plain": (4, 2)}[MACHINE]
COUNT = 4 * QUARTERS  # sums in registers
I, U64 = i32(LANES), u8(64)


def _interleaved(builder, rows, quarter):
    """Of each 16 bytes of four rows the four of one quarter, as [byte, row]."""
    def unpack(x, y, size, high):
        n, half = x.type.count, 8 if high else 0
        lanes = [[base + half + e + side * n + b for e in range(0, 8, size) for side in (0, 1) for b in range(size)]
                 for base in range(0, n, 16)]
        return emit.pick(builder, x, y, sum(lanes, []))
    pairs = [unpack(x, y, 1, quarter >= 2) for x, y in (rows[:2], rows[2:])]
    return unpack(*pairs, 2, quarter % 2)


@intrinsic(prefer_literal=True)
def input_dots(typingctx, acc, first, codes, at0, at1, at2, at3, word):
    """acc[quarter - first, two bits] plus four inputs' weights, whose bytes start at at0 ... at3, times the four bytes of `word`."""
    begin, lanes = _count(first), acc.dtype.lanes

    def codegen(context, builder, sig, args):
        out, vec = _unpack(builder, args[0], acc.count), acc.dtype.ir
        bytes_ir = ir.VectorType(I8, 4 * lanes)
        rows = [emit.load(builder, _address(context, builder, sig.args[2], args[2], place), bytes_ir) for place in args[3:7]]
        x = emit.splat(builder, vec, args[7])
        for q in range(acc.count // 4):
            u = _interleaved(builder, rows, begin + q)
            for c in range(4):
                field = builder.lshr(u, emit.constant(bytes_ir, 2 * c)) if c else u
                field = builder.and_(field, emit.constant(bytes_ir, 3)) if c < 3 else field
                out[4 * q + c] = emit.dot4(builder, out[4 * q + c], field, x)
        return _pack(context, builder, acc, out)
    return acc(acc, first, codes, *(types.intp,) * 4, types.int32), codegen


@intrinsic(prefer_literal=True)
def input_step(typingctx, quarter, codes, first):
    """The bytes of one quarter of 64 bytes of four inputs, one after another from `first` on: [byte, input]."""
    number, vec = _count(quarter), Vec("u8", 64)

    def codegen(context, builder, sig, args):
        base = _address(context, builder, sig.args[1], args[1], args[2])
        return _interleaved(builder, [emit.load(builder, builder.gep(base, [emit.I64(64 * r)]), vec.ir) for r in range(4)], number)
    return vec(quarter, codes, types.intp), codegen


# ---- one token --------------------------------------------------------------------------------------------------------
def list_bytes(padded: int) -> int:
    """Of a token's list: how many inputs are not zero, their numbers int32, their codes int8, each part in whole cache lines."""
    return 192 + 5 * padded


list_bytes_of = njit(nogil=True, error_model="numpy")(list_bytes)


@njit(nogil=True, error_model="numpy")
def list_inputs(x, first, k, padded, activation_bits, scales, starts, token, place, scratch):
    """The list at address `place` of a token's k floats from x[first] on; filled up to fours with zeros. scales and starts as in
    quantise_token; scratch is the address of `padded` bytes."""
    factor, codes = factor_of(x, first, k, activation_bits), at(int8, scratch)
    total = quantise_slice(x, first, k, padded, factor, 1, activation_bits, codes)
    numbers, values, n = at(int32, place + 64), at(int8, place + 128 + 4 * padded), np.int64(0)
    for i in range(padded):  # without branches: half of them would be mispredicted
        numbers[n], values[n] = i, codes[i]
        n += np.int64(codes[i] != 0)
    while n % 4:
        numbers[n], values[n], n = 0, 0, n + 1
    at(int32, place)[0] = n
    scales[token], starts[token] = np.float32(1) / factor, BIAS - np.int32(2) * total


def _build_sums(first):
    @variant(first)
    def sums(codes, base, part, numbers, words, count, out):
        """Of QUARTERS quarters of a tile from `first` on, and LANES lanes from 4 * `part` on: products summed up, int32 out[256]."""
        acc = zeros(I, COUNT)
        for i in range(0, count, 4):
            for j in range(4):
                prefetch(codes, base + np.int64(numbers[min(i + AHEAD + j, count - 1)]) * 64)
            at_ = base + 16 * part
            acc = input_dots(acc, first, codes, at_ + np.int64(numbers[i]) * 64, at_ + np.int64(numbers[i + 1]) * 64,
                             at_ + np.int64(numbers[i + 2]) * 64, at_ + np.int64(numbers[i + 3]) * 64, words[i // 4])
        store_tile(out, 64 * first + 4 * part, 16, 0, 1, acc)
    return sums


_sums0, _sums2 = _build_sums(0), _build_sums(2)


@njit(nogil=True, error_model="numpy")
def tile_sums(codes, base, padded, place, out):
    """Products of a tile, whose codes start at `base`, and a token's list at address `place`: int32 out[256]."""
    numbers, words, count = at(int32, place + 64), at(int32, place + 128 + 4 * padded), np.int64(at(int32, place)[0])
    for part in range(0, 4, LANES // 4):
        _sums0(codes, base, part, numbers, words, count, out)
        if QUARTERS == 2:
            _sums2(codes, base, part, numbers, words, count, out)


# ---- many tokens ------------------------------------------------------------------------------------------------------
def _build_unpack(quarter):
    @variant(quarter)
    def unpack(codes, base, size, shift, w, to):
        for s in range(0, size // 4, 2):
            u, v = input_step(quarter, codes, base + s * 256), input_step(quarter, codes, base + s * 256 + 256)
            store_steps(w, to + s * COLUMNS * 64, COLUMNS * 64, (u >> shift) & 3, (v >> shift) & 3)
    return unpack


_unpack0, _unpack1, _unpack2, _unpack3 = (_build_unpack(q) for q in range(4))


@njit(nogil=True, error_model="numpy")
def unpack_inputs(codes, base, size, panel, w, to):
    """`size` K of 16 outputs, panel 0 ... 15 of a tile, from codes[base] on: bytes w[step of 4 K, column, 64] from `to` on."""
    shift = 2 * (panel % 4)
    if panel < 4:
        _unpack0(codes, base, size, shift, w, to)
    elif panel < 8:
        _unpack1(codes, base, size, shift, w, to)
    elif panel < 12:
        _unpack2(codes, base, size, shift, w, to)
    else:
        _unpack3(codes, base, size, shift, w, to)
