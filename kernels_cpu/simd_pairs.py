"""Register tiles for Arm's matrix product (i8mm), under the names that simd.py gives to tiles of whole rows.

`smmla` multiplies 2 rows by 2 outputs over 8 bytes of K, so here a tile is a tuple of 2 x 2 squares, row pair by row pair, each
square (row 0: output 0, 1; row 1: output 0, 1). Rows and outputs are even in number; there is one column of outputs.
Two steps of K are taken together: activations [double step, row, 8 bytes], weights likewise [double step, output, 8 bytes].
"""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeattn.kernels_cpu import simd_emit as emit
from edgeattn.kernels_cpu.simd import Vec, _address, _count, _pack, _rows, _unpack, _vec
from edgeattn.kernels_cpu.simd_emit import F32, I8, I32, I64

FOUR = {"f32": Vec("f32", 4), "i32": Vec("i32", 4)}


def _squares(vec, rows):
    """The tile that stands for `rows` rows of `vec`."""
    return types.UniTuple(FOUR[vec.elem], _count(rows) // 2 * (vec.lanes // 2))


def _twice(builder, pointer, element, pattern):
    """Two neighbours, repeated by pattern: (0, 0, 1, 1) for rows, (0, 1, 0, 1) for outputs."""
    two = emit.load(builder, pointer, ir.VectorType(element, 2))
    return emit.pick(builder, two, two, pattern)


def _row_pairs(context, builder, array_type, array, first, element, pairs):
    base = _address(context, builder, array_type, array, first)
    return [_twice(builder, builder.gep(base, [I64(2 * p)]), element, (0, 0, 1, 1)) for p in range(pairs)]


def _columns(builder, vector):
    """A vector of outputs as columns of squares."""
    return [emit.pick(builder, vector, vector, (c, c + 1, c, c + 1)) for c in range(0, vector.type.count, 2)]


@intrinsic(prefer_literal=True)
def broadcast_rows(typingctx, vec, rows, columns, array, first):
    tile = _squares(_vec(vec), rows)

    def codegen(context, builder, sig, args):
        found = _row_pairs(context, builder, sig.args[3], *args[3:], tile.dtype.ir.element, _count(rows) // 2)
        return _pack(context, builder, tile, [x for x in found for _ in range(_vec(vec).lanes // 2)])
    return tile(vec, rows, columns, array, types.intp), codegen


@intrinsic(prefer_literal=True)
def load_rows(typingctx, vec, rows, columns, array, first, row_stride, column_stride):
    tile = _squares(_vec(vec), rows)

    def codegen(context, builder, sig, args):
        pointers, out, two = _rows(context, builder, sig.args[3], *args[3:6], _count(rows)), [], ir.VectorType(F32, 2)
        for upper, lower in zip(pointers[::2], pointers[1::2]):
            for c in range(0, _vec(vec).lanes, 2):
                halves = [emit.load(builder, builder.gep(p, [I64(c)]), two) for p in (upper, lower)]
                out.append(emit.join(builder, halves))
        return _pack(context, builder, tile, out)
    return tile(vec, rows, columns, array, *(types.intp,) * 3), codegen


@intrinsic(prefer_literal=True)
def store_tile(typingctx, array, first, row_stride, column_stride, columns, tile):
    per_row = _count(column_stride) // 2  # squares: the column's lanes are its stride
    n_rows = tile.count // per_row * 2

    def codegen(context, builder, sig, args):
        pointers = _rows(context, builder, sig.args[0], *args[:3], n_rows)
        for i, square in enumerate(_unpack(builder, args[5], tile.count)):
            for r in (0, 1):
                p = builder.gep(pointers[i // per_row * 2 + r], [I64(i % per_row * 2)])
                half = emit.part(builder, square, 2 * r, 2)
                builder.store(half, builder.bitcast(p, half.type.as_pointer()), align=1)
        return context.get_dummy_value()
    return types.void(array, types.intp, types.intp, column_stride, columns, tile), codegen


@intrinsic
def outer_dot(typingctx, acc, w, array, first):
    """acc[row pair, output pair] += 8 signed bytes of each row times 8 of each output."""
    n_columns = w.dtype.lanes // 16
    n_rows = acc.count // n_columns

    def codegen(context, builder, sig, args):
        operand, out = ir.VectorType(I8, 16), _unpack(builder, args[0], acc.count)
        base = builder.bitcast(_address(context, builder, sig.args[2], *args[2:]), I8.as_pointer())
        rows = [emit.load(builder, builder.gep(base, [I64(16 * r)]), operand) for r in range(n_rows)]
        weights = builder.extract_value(args[1], 0)
        for c in range(n_columns):
            column = emit.part(builder, weights, 16 * c, 16)
            for r in range(n_rows):
                i = r * n_columns + c
                out[i] = emit.call(builder, "llvm.aarch64.neon.smmla.v4i32.v16i8", acc.dtype.ir, out[i], rows[r], column)
        return _pack(context, builder, acc, out)
    return acc(acc, w, array, types.intp), codegen


def _outer(value):
    """total[square] += value * column * row, column and row being those of the square."""
    def codegen(context, builder, sig, total, accs, column, array_type, array, first):
        columns, totals = _columns(builder, builder.extract_value(column, 0)), _unpack(builder, total, sig.return_type.count)
        rows = _row_pairs(context, builder, array_type, array, first, F32, len(totals) // len(columns))
        out = [emit.fma(builder, value(builder, accs, i, columns[i % len(columns)]), rows[i // len(columns)], t)
               for i, t in enumerate(totals)]
        return _pack(context, builder, sig.return_type, out)
    return codegen


_scaled = _outer(lambda builder, accs, i, column: builder.fmul(emit.dot_float(builder, builder.extract_value(accs, i), column.type),
                                                               column))
_plain = _outer(lambda builder, accs, i, column: column)


@intrinsic
def outer_fma(typingctx, total, acc, column_scale, array, first):
    def codegen(context, builder, sig, args):
        return _scaled(context, builder, sig, args[0], args[1], args[2], sig.args[3], *args[3:])
    return total(total, acc, column_scale, array, types.intp), codegen


@intrinsic
def outer_add(typingctx, total, column, array, first):
    def codegen(context, builder, sig, args):
        return _plain(context, builder, sig, args[0], None, args[1], sig.args[2], *args[2:])
    return total(total, column, array, types.intp), codegen


@intrinsic
def store_steps(typingctx, array, first, stride, a, b):
    """Two steps of weights, 4 bytes of each output in turn, as one double step at `first`, 8 bytes an output."""
    def codegen(context, builder, sig, args):
        n = a.lanes // 4
        x, y = (builder.bitcast(v, ir.VectorType(I32, n)) for v in args[3:])
        value = emit.pick(builder, x, y, [i + side * n for i in range(n) for side in (0, 1)])
        pointer = _address(context, builder, sig.args[0], args[0], args[1])
        builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=1)
        return context.get_dummy_value()
    return types.void(array, types.intp, types.intp, a, b), codegen
