"""Float kernels' vector operations beyond simd.py: loads and stores by the array's type, ragged ends, exponentials.

The logical vector is F, 16 floats. Arrays of halves hold their bits as uint16.
"""
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from edgeattn.kernels_cpu import simd_emit as emit
from edgeattn.kernels_cpu.simd import Vec, bitcast, convert, f32, fma, i32, load, load_half, splat, store, vmax, vmin

F, I, H = f32(16), i32(16), Vec("u16", 16)
LOG2E, LN2_HIGH, LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
LOWEST, HIGHEST = np.float32(-87.3365), np.float32(88.7228)  # beyond them e^x is no normal float32
I64 = ir.IntType(64)


def _address(context, builder, array_type, array, index):
    data = array if isinstance(array_type, types.CPointer) else context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


# ---- memory -----------------------------------------------------------------------------------------------------
def load_float(array, index):
    """F from 16 elements of a float32 array, or of halves in a uint16 array."""


def load_end(array, index, n):
    """The same from n < 16 elements, zeros behind them: the ragged end of a row."""


def store_float(array, index, value):
    """F as 16 elements of a float32 array, or as halves (to nearest even) in a uint16 array."""


def is_half(array):
    """Whether an array holds halves; known when a kernel is compiled."""


@overload(is_half)
def _is_half(array):
    half = array.dtype == types.uint16
    return lambda array: half


@overload(load_float)
def _load_float(array, index):
    if array.dtype == types.uint16:
        return lambda array, index: load_half(F, array, index)
    return lambda array, index: load(F, array, index)


@overload(load_end)
def _load_end(array, index, n):
    if array.dtype == types.uint16:
        return lambda array, index, n: from_half(load_some(H, array, index, n))
    return lambda array, index, n: load_some(F, array, index, n)


@overload(store_float)
def _store_float(array, index, value):
    if array.dtype == types.uint16:
        return lambda array, index, value: store(array, index, to_half(value))
    return lambda array, index, value: store(array, index, value)


@intrinsic
def from_half(typingctx, bits):
    def codegen(context, builder, sig, args):
        return emit.from_half(builder, args[0], F.ir)
    return F(bits), codegen


@intrinsic
def to_half(typingctx, value):
    """f32 lanes as the bits of IEEE halves."""
    def codegen(context, builder, sig, args):
        if emit.MACHINE != "plain":
            return builder.bitcast(builder.fptrunc(args[0], ir.VectorType(ir.HalfType(), H.lanes)), H.ir)
        return _half_bits(builder, args[0], H.ir)
    return H(value), codegen


def _half_bits(builder, x, halves):
    """Without an instruction LLVM would call a function that the process may lack. Multiplying by 2**112 and back drops what
    is too large; adding a suitable power of two rounds at the right bit, subnormals included."""
    wide = ir.VectorType(ir.IntType(32), halves.count)
    bits = builder.bitcast(x, wide)
    size = builder.and_(bits, emit.constant(wide, 0x7FFFFFFF))
    exponent = builder.and_(size, emit.constant(wide, 0x7F800000))
    # ulp of the half is 2**-10 of its power of two, and at least 2**-24: adding 2**13 times ulp rounds to it
    small = builder.icmp_unsigned("<", exponent, emit.constant(wide, 113 << 23))
    exponent = builder.select(small, emit.constant(wide, 113 << 23), exponent)
    magic = builder.add(exponent, emit.constant(wide, 13 << 23))
    rounded = builder.fadd(builder.bitcast(size, x.type), builder.bitcast(magic, x.type))
    # what stands in the low bits of the sum is the half's mantissa, its hidden bit included
    mantissa = builder.sub(builder.bitcast(rounded, wide), magic)
    base = builder.lshr(builder.sub(exponent, emit.constant(wide, 113 << 23)), emit.constant(wide, 13))
    half = builder.add(base, mantissa)
    large = builder.icmp_unsigned(">=", size, emit.constant(wide, 0x477FF000))
    nan = builder.icmp_unsigned(">", size, emit.constant(wide, 0x7F800000))
    half = builder.select(large, builder.select(nan, emit.constant(wide, 0x7E00), emit.constant(wide, 0x7C00)), half)
    sign = builder.lshr(builder.and_(bits, emit.constant(wide, 0x80000000)), emit.constant(wide, 16))
    return builder.trunc(builder.or_(half, sign), halves)


@intrinsic
def load_some(typingctx, vec, array, index, n):
    """A vector of n elements, zeros behind them."""
    v = vec.instance_type

    def codegen(context, builder, sig, args):
        slot = cgutils.alloca_once_value(builder, emit.constant(v.ir, 0))
        first = builder.bitcast(slot, v.ir.element.as_pointer())
        with cgutils.for_range(builder, args[3]) as loop:
            source = _address(context, builder, array, args[1], builder.add(args[2], loop.index))
            builder.store(builder.load(source), builder.gep(first, [loop.index]))
        return builder.load(slot)
    return v(vec, array, types.intp, types.intp), codegen


@intrinsic
def store_some(typingctx, array, index, n, value):
    """The first n lanes."""
    def codegen(context, builder, sig, args):
        slot = cgutils.alloca_once_value(builder, args[3])
        first = builder.bitcast(slot, value.ir.element.as_pointer())
        with cgutils.for_range(builder, args[2]) as loop:
            target = _address(context, builder, array, args[0], builder.add(args[1], loop.index))
            builder.store(builder.load(builder.gep(first, [loop.index])), target)
        return context.get_dummy_value()
    return types.void(array, types.intp, types.intp, value), codegen


def scatter_float(array, index, stride, value):
    """The lanes of F to elements `stride` apart, as float32 or halves."""


@overload(scatter_float)
def _scatter_float(array, index, stride, value):
    if array.dtype == types.uint16:
        return lambda array, index, stride, value: _scatter(array, index, stride, to_half(value))
    return lambda array, index, stride, value: _scatter(array, index, stride, value)


@intrinsic
def _scatter(typingctx, array, index, stride, value):
    def codegen(context, builder, sig, args):
        for i in range(value.lanes):
            at = builder.add(args[1], builder.mul(args[2], I64(i)))
            builder.store(builder.extract_element(args[3], emit.I32(i)), _address(context, builder, array, args[0], at))
        return context.get_dummy_value()
    return types.void(array, types.intp, types.intp, value), codegen


@intrinsic
def fetch_add(typingctx, array, index, n):
    """array[index] += n as one step for all threads; -> the value before."""
    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _address(context, builder, array, args[0], args[1]), args[2], "monotonic")
    return types.int64(array, types.intp, types.int64), codegen


# ---- arithmetic -------------------------------------------------------------------------------------------------
def _select(comparison):
    @intrinsic
    def op(typingctx, a, b, x, y):
        def codegen(context, builder, sig, args):
            compare = builder.fcmp_ordered if a.is_float else builder.icmp_signed
            return builder.select(compare(comparison, args[0], args[1]), args[2], args[3])
        return x(a, a, x, x), codegen
    return op


where_less = _select("<")  # x where a < b, else y


@intrinsic
def any_greater(typingctx, a, b):
    """Whether a > b in any lane."""
    def codegen(context, builder, sig, args):
        lanes = builder.fcmp_ordered(">", *args)
        bits = builder.bitcast(lanes, ir.IntType(a.lanes))
        return builder.icmp_unsigned("!=", bits, bits.type(0))
    return types.boolean(a, a), codegen


@intrinsic
def lanes_of(typingctx, low, high, index):
    """Lane i: lane index[i] of `low` and `high`, side by side."""
    def codegen(context, builder, sig, args):
        return emit.lanes_of(builder, *args)
    return low(low, high, index), codegen


@intrinsic
def count_bits(typingctx, bits):
    """Of the low 32 bits: for each how many below it are set, two vectors, and how many of all."""
    def codegen(context, builder, sig, args):
        bits = builder.trunc(args[0], emit.I32)
        below = [ir.Constant(I.ir, [(1 << t) - 1 for t in range(first, first + 16)]) for first in (0, 16)]
        found = [emit.call(builder, "llvm.ctpop.v16i32", I.ir, builder.and_(emit.splat(builder, I.ir, bits), x)) for x in below]
        total = builder.zext(emit.call(builder, "llvm.ctpop.i32", bits.type, bits), I64)
        return context.make_tuple(builder, sig.return_type, [*found, total])
    return types.Tuple((I, I, types.int64))(types.int64), codegen


@intrinsic
def divide(typingctx, a, b):
    def codegen(context, builder, sig, args):
        return builder.fdiv(*args)
    return a(a, a), codegen


@intrinsic
def sqrt(typingctx, a):
    def codegen(context, builder, sig, args):
        return emit.call(builder, f"llvm.sqrt.v{a.lanes}f32", a.ir, args[0])
    return a(a), codegen


@intrinsic
def lane_numbers(typingctx, vec):
    """0, 1, 2 ..."""
    v = vec.instance_type

    def codegen(context, builder, sig, args):
        return ir.Constant(v.ir, list(range(v.lanes)))
    return v(vec), codegen


@njit(nogil=True, error_model="numpy")
def exp_low(x):
    """e^x for x up to HIGHEST, to 2e-7 relative; 0 below LOWEST."""
    clamped = vmax(splat(F, LOWEST), x)  # in this order NaN stays
    n = convert(I, clamped * LOG2E)
    whole = convert(F, n)
    r = fma(whole, splat(F, -LN2_LOW), fma(whole, splat(F, -LN2_HIGH), clamped))
    p = fma(r, splat(F, np.float32(0.0083125297)), splat(F, np.float32(0.04189011)))
    p = fma(p, r, splat(F, np.float32(0.16667114)))
    p = fma(p, r, splat(F, np.float32(0.49999232)))
    p = fma(p, r, splat(F, np.float32(1)))
    p = fma(p, r, splat(F, np.float32(1)))
    return where_less(x, splat(F, LOWEST), splat(F, np.float32(0)), bitcast(F, bitcast(I, p) + (n << 23)))


@njit(nogil=True, error_model="numpy")
def exp(x):
    """e^x to 2e-7 relative; infinity beyond the largest float32."""
    top = splat(F, HIGHEST)
    half = exp_low(vmin(top, x) * np.float32(0.5))  # squared, because 2^128 has no exponent bits
    return where_less(top, x, splat(F, np.float32(np.inf)), half * half)


@njit(nogil=True, error_model="numpy")
def half_towards(x, up):
    """The bits of the nearest half not below x (not above, without `up`), 16 lanes."""
    bits = convert(I, to_half(x))
    back = from_half(to_half(x))
    negative = where_less(splat(I, np.int32(0x7FFF)), bits, splat(I, np.int32(1)), splat(I, np.int32(0)))
    if up:  # one unit towards infinity: only for x >= 0
        return where_less(back, x, bits + 1, bits)
    lower = bits - 1 + negative * 2
    lower = where_less(bits, splat(I, np.int32(1)), splat(I, np.int32(0x8001)), lower)
    return where_less(x, back, lower, bits)
