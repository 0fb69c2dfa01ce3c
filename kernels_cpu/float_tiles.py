"""Register tiles of floats: tuples of vectors, row by row.

A tile is ROWS x COLUMNS vectors: large enough to hide the latency of fma, small enough for the machine's registers.
"""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from edgeattn.kernels_cpu import simd_emit as emit
from edgeattn.kernels_cpu.floats import F, _address
from edgeattn.kernels_cpu.simd import Vec, load_half_tile, load_tile

ROWS, COLUMNS = {"avx512": (12, 2), "avxvnni": (6, 1), "avx2": (6, 1), "neon": (6, 1), "plain": (4, 1)}[emit.MACHINE]
TILE, BLOCK = ROWS * COLUMNS, 16 * COLUMNS  # vectors of a tile, floats across a tile
I64 = ir.IntType(64)


def _tile(tile, value, builder):
    return [builder.extract_value(value, i) for i in range(tile.count)]


def _outer(builder, tile, totals, columns, rows):
    return [emit.fma(builder, columns[i % len(columns)], rows[i // len(columns)], totals[i]) for i in range(tile.count)]


@intrinsic
def outer_add_rows(typingctx, total, w, array, first, stride):
    """total[r, c] += w[c] * array[first + r * stride]."""
    def codegen(context, builder, sig, args):
        totals, columns = _tile(total, args[0], builder), _tile(w, args[1], builder)
        rows = []
        for r in range(total.count // w.count):
            at = builder.add(args[3], builder.mul(args[4], I64(r)))
            rows.append(emit.splat(builder, F.ir, builder.load(_address(context, builder, array, args[2], at))))
        return context.make_tuple(builder, total, _outer(builder, total, totals, columns, rows))
    return total(total, w, array, types.intp, types.intp), codegen


@intrinsic
def transpose(typingctx, tile):
    """Square tile of vectors, transposed: n rounds of pairwise interleaving for 2**n vectors."""
    n = tile.count

    def codegen(context, builder, sig, args):
        rows, lanes = _tile(tile, args[0], builder), tile.dtype.lanes
        for _ in range(n.bit_length() - 1):
            low, high = rows[:n // 2], rows[n // 2:]
            pairs = [[i // 2 + (lanes if i % 2 else 0) + part for i in range(lanes)] for part in (0, lanes // 2)]
            rows = [emit.pick(builder, a, b, lanes_of) for a, b in zip(low, high) for lanes_of in pairs]
        return context.make_tuple(builder, tile, rows)
    return tile(tile), codegen


@intrinsic
def outer_product(typingctx, total, rows, columns):
    """total[r, c] += rows[r] * columns[c], lane by lane."""
    def codegen(context, builder, sig, args):
        totals, w = _tile(total, args[0], builder), _tile(columns, args[2], builder)
        x = _tile(rows, args[1], builder)
        return context.make_tuple(builder, total, _outer(builder, total, totals, w, x))
    return total(total, rows, columns), codegen


def load_floats(count, array, first, stride):
    """`count` F, `stride` elements apart, from a float32 array or from halves."""


@overload(load_floats, prefer_literal=True)
def _load_floats(count, array, first, stride):
    if array.dtype == types.uint16:
        return lambda count, array, first, stride: load_half_tile(F, count, array, first, stride)
    return lambda count, array, first, stride: load_tile(F, count, array, first, stride)


@intrinsic
def add_scaled(typingctx, total, acc, array, first):
    """total[r, c] += float(acc[r, c]) * array[first + r], of tiles with four rows."""
    def codegen(context, builder, sig, args):
        totals, accs, columns = _tile(total, args[0], builder), _tile(acc, args[1], builder), total.count // 4
        rows = emit.broadcasts(builder, _address(context, builder, array, *args[2:]), F.ir, 4)
        out = [emit.fma(builder, builder.sitofp(accs[i], F.ir), rows[i // columns], totals[i]) for i in range(total.count)]
        return context.make_tuple(builder, total, out)
    return total(total, acc, array, types.intp), codegen


@intrinsic
def times_16(typingctx, tile):
    """A tile of integers."""
    def codegen(context, builder, sig, args):
        parts = _tile(tile, args[0], builder)
        return context.make_tuple(builder, tile, [builder.shl(x, emit.constant(x.type, 4)) for x in parts])
    return tile(tile), codegen


@intrinsic
def weave(typingctx, a, b, c, d):
    """Signed bytes [quad][a, b, c, d][4] of four vectors of 16 small integers: quad q of each stands together."""
    out = Vec("i8", 64)

    def codegen(context, builder, sig, args):
        if emit.MACHINE == "avx512":  # packing with saturation works within 16 bytes: just this order
            words = ir.VectorType(ir.IntType(16), 32)
            pairs = [emit.call(builder, "llvm.x86.avx512.packssdw.512", words, x, y) for x, y in (args[:2], args[2:])]
            return emit.call(builder, "llvm.x86.avx512.packsswb.512", out.ir, *pairs)
        quads = [builder.bitcast(builder.trunc(x, ir.VectorType(ir.IntType(8), 16)), ir.VectorType(ir.IntType(32), 4)) for x in args]
        halves = [emit.pick(builder, x, y, range(8)) for x, y in (quads[:2], quads[2:])]
        whole = emit.pick(builder, *halves, [4 * v + q for q in range(4) for v in range(4)])
        return builder.bitcast(whole, out.ir)
    return out(a, b, c, d), codegen


@intrinsic
def add_tile(typingctx, a, b):
    def codegen(context, builder, sig, args):
        pairs = zip(_tile(a, args[0], builder), _tile(a, args[1], builder))
        return context.make_tuple(builder, a, [builder.fadd(x, y) for x, y in pairs])
    return a(a, a), codegen
