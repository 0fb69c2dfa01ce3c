"""Dot products of 2- and 3-bit codes and of ternary digits straight from memory, as `packed_dots` of simd.py does them for 4 bits.

A byte holds four neighbours of K, two bits each, low bits first, so activations come in four phases: those of k mod 4 = 0, then 1, 2, 3.
3-bit codes have their third bits in steps of their own behind the others: bit c + 4 * h of a byte belongs to phase c of step 2 * t + h.
"""
from functools import reduce

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from edgeattn.kernels_cpu import simd_emit as emit
from edgeattn.kernels_cpu.simd import _address, _codes8, _count, _pack, _rows, _step_rows, _unpack
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


# ---- five ternary digits to a byte ------------------------------------------------------------------------------------
# A byte is the fraction 0.d0 d1 d2 d3 d4 in base 3, in units of 1 / 256, rounded up: with s0 that byte, s1 = 3 * s0 mod 256 and so on,
# digit d_n is what overflows, (3 * s_n - s_n+1) / 256. So sum_n d_n * x_n needs no digits: it is 1 / 256 of sum_n s_n * y_n over the six s,
# where y_n = 3 * x_n - x_n-1 (x_-1 = x_5 = 0), and a step from one s to the next is two additions of bytes. y takes 10 bits: 4 * high
# + low, both int8, of which the last y needs low alone. Where codes are signed, s - 128 takes the place of s: 3 * (s - 128) = 3 * s - 128
# mod 256.
WORDS = 11  # of 4 activations for a step: high of y0 ... y4, low of y0 ... y5


@intrinsic(prefer_literal=True)
def trit_dots(typingctx, acc, chains, columns, steps, codes, at, gap, a, first):
    """acc plus products of `steps` steps of codes, column c's at `at + c * gap`, and activations at `first`: words [step, WORDS, row].

    acc is [high or low, chain, row, column]: `chains` sums side by side hide the latency.
    """
    n_columns, n_steps, n_chains = _count(columns), _count(steps), _count(chains)
    count = acc.count // (2 * n_chains)
    n_rows = count // n_columns

    def codegen(context, builder, sig, args):
        acc_in, _, _, _, codes_in, at_in, gap_in, a_in, first_in = args
        vec, out = acc.dtype.ir, _unpack(builder, acc_in, acc.count)
        bytes_ir = ir.VectorType(I8, 4 * vec.count)
        base = _address(context, builder, sig.args[7], a_in, first_in)
        for s in range(n_steps):
            rows = emit.broadcasts(builder, builder.gep(base, [I64(4 * WORDS * n_rows * s)]), vec, WORDS * n_rows)
            start = builder.add(at_in, I64(64 * s))
            for c, pointer in enumerate(_rows(context, builder, sig.args[4], codes_in, start, gap_in, n_columns)):
                state = _codes8(builder, emit.load(builder, pointer, bytes_ir))
                for n in range(6):
                    if n:  # opaque: LLVM would make it multiplications, which are slow for bytes
                        state = builder.add(emit.opaque(builder, builder.add(state, state)), state)
                    for part in ((0, 1) if n < 5 else (1,)):
                        for r in range(n_rows):
                            i = (part * n_chains + n % n_chains) * count + r * n_columns + c
                            out[i] = emit.dot8(builder, out[i], state, rows[(5 * part + n) * n_rows + r])
        return _pack(context, builder, acc, out)
    return acc(acc, chains, columns, steps, codes, types.intp, types.intp, a, types.intp), codegen


@intrinsic(prefer_literal=True)
def trit_totals(typingctx, acc, start, chains):
    """BIAS + (4 * high + low + start) / 256, exact."""
    def codegen(context, builder, sig, args):
        vec, n = start.dtype.ir, _count(chains)
        parts, out = _unpack(builder, args[0], acc.count), []
        for i, total in enumerate(_unpack(builder, args[1], start.count)):
            size = n * start.count
            high, low = (reduce(builder.add, parts[part * size + i:(part + 1) * size:start.count]) for part in (0, 1))
            total = builder.add(builder.add(total, low), builder.shl(high, emit.constant(vec, 2)))
            out.append(builder.add(builder.ashr(total, emit.constant(vec, 8)), emit.constant(vec, int(emit.BIAS))))
        return _pack(context, builder, start, out)
    return start(acc, start, chains), codegen


@intrinsic
def trit(typingctx, value):
    """The first digit, 0 ... 2, of every byte."""
    def codegen(context, builder, sig, args):
        above = [builder.zext(builder.icmp_unsigned(">=", args[0], emit.constant(value.ir, least)), value.ir) for least in (86, 171)]
        return builder.add(*above)
    return value(value), codegen
