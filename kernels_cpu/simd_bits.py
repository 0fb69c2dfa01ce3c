"""Dot products of 2- and 3-bit codes straight from memory, as `packed_dots` of simd.py does them for 4 bits.

A byte holds four neighbours of K, two bits each, low bits first, so activations come in four phases: those of k mod 4 = 0, then 1, 2, 3.
3-bit codes have their third bits in steps of their own behind the others: bit c + 4 * h of a byte belongs to phase c of step 2 * t + h.
"""
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeattn.kernels_cpu import simd_emit as emit
from edgeattn.kernels_cpu.simd import _address, _count, _pack, _rows, _step_rows, _unpack
from edgeattn.kernels_cpu.simd_emit import I8, I64

PHASES = 4


def _phase(builder, low, high, c, half):
    """Codes of phase c of a step, from its bytes and, for 3 bits, those of the third bits."""
    u = builder.lshr(low, emit.constant(low.type, 2 * c)) if c else low
    if c < PHASES - 1:
        u = builder.and_(u, emit.constant(low.type, 3))
    if high is None:
        return u
    shift = c + PHASES * half - 2  # from where the bit is to where it has the value 4
    moved = builder.lshr(high, emit.constant(low.type, shift)) if shift >= 0 else builder.shl(high, emit.constant(low.type, -shift))
    return builder.or_(u, builder.and_(moved, emit.constant(low.type, 4)))


def _dots(third_bits):
    @intrinsic(prefer_literal=True)
    def op(typingctx, acc, columns, steps, codes, at, high, gap, a, first, apart):
        """outer_dot over `steps` steps of packed codes, 64 bytes apart.

        Column c's codes start at `at + c * gap`, its third bits (of 3-bit codes) at `high + c * gap`; phase p meets the signed bytes of
        `a` from `first + p * apart` on, step by step, in each step 4 bytes a row.
        """
        n_columns, n_steps = _count(columns), _count(steps)

        def codegen(context, builder, sig, args):
            acc_in, _, _, codes_in, at_in, high_in, gap_in, a_in, first_in, apart_in = args
            vec, n_rows = acc.dtype.ir, acc.count // n_columns
            bytes_ir = ir.VectorType(I8, 4 * vec.count)
            chains = [_unpack(builder, acc_in, acc.count), [emit.constant(vec, 0)] * acc.count]  # two hide the latency
            pointers = _rows(context, builder, sig.args[7], a_in, first_in, apart_in, PHASES)

            def fetch(start, s):
                where = builder.add(start, I64(64 * s))
                return [emit.load(builder, p, bytes_ir) for p in _rows(context, builder, sig.args[3], codes_in, where, gap_in, n_columns)]
            for s in range(n_steps):
                if s % 2 == 0:
                    third = fetch(high_in, s // 2) if third_bits else [None] * n_columns
                for c, low in enumerate(fetch(at_in, s)):
                    for p in range(PHASES):
                        u = _phase(builder, low, third[c], p, s % 2)
                        for r, row in enumerate(_step_rows(builder, pointers[p], vec, n_rows, s, n_steps)):
                            i, chain = r * n_columns + c, chains[p % 2]
                            chain[i] = emit.dot4(builder, chain[i], u, row)
            return _pack(context, builder, acc, [builder.add(x, y) for x, y in zip(*chains)])
        return acc(acc, columns, steps, codes, types.intp, types.intp, types.intp, a, types.intp, types.intp), codegen
    return op


quarter_dots, three_bit_dots = _dots(False), _dots(True)
