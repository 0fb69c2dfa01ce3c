"""The LLVM code behind simd.py: the few operations that LLVM cannot split or select by itself, one version a machine.

Everything else in simd.py is the same LLVM for all machines. Vectors here are LLVM values of any lane count; those longer
than a register are taken apart into registers and joined again.
"""
import numpy as np
from llvmlite import ir

from edgeattn.kernels_cpu import ARM, LEVEL

MACHINE = "neon" if LEVEL == "i8mm" else LEVEL  # i8mm adds one instruction, the rest is the same
WIDTH = {"avx512": 16, "avxvnni": 8, "avx2": 8, "neon": 4, "plain": 4}[MACHINE]  # 32-bit lanes of one register
BIAS = np.int32(0x4B400000)  # the bits of 12582912.0f: adding |n| < 2**22 to them gives the bits of 12582912.0f + n
CODE_TOP = np.int32(255 if MACHINE in ("avx512", "avxvnni") else 127)  # the largest code that dot4 takes
SIGNED_BYTES = MACHINE in ("avx2", "neon", "plain")  # dot8 takes codes as signed bytes, their top bit flipped

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, PTR = ir.FloatType(), ir.IntType(8).as_pointer()


def call(builder, name, result, *args):
    """Call the LLVM intrinsic `name`, declared once per module."""
    module = builder.module
    fn = module.globals.get(name) or ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
    return builder.call(fn, args)


def constant(vec, value):
    return ir.Constant(vec, [value] * vec.count)


def pick(builder, a, b, lanes):
    """The lanes of a, then b, that the list names."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(builder, vec, scalar):
    one = builder.insert_element(ir.Constant(vec, ir.Undefined), scalar, I32(0))
    return pick(builder, one, one, [0] * vec.count)


def load(builder, pointer, vec):
    return builder.load(builder.bitcast(pointer, vec.as_pointer()), align=1)


def part(builder, v, start, n):
    return v if n == v.type.count else pick(builder, v, v, range(start, start + n))


def join(builder, parts):
    while len(parts) > 1:
        parts = [pick(builder, a, b, range(2 * a.type.count)) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


def opaque(builder, v):
    """v, about which LLVM knows nothing: an empty instruction on each of its registers."""
    parts, register = [], {"avx512": "v"}.get(MACHINE, "w" if ARM else "x")
    for i in range(0, v.type.count, piece := min(v.type.count, 4 * WIDTH)):
        one = part(builder, v, i, piece)
        parts.append(builder.asm(ir.FunctionType(one.type, [one.type]), "", f"={register},0", [one], False))
    return join(builder, parts)


def halving(builder, x, combine):
    """Reduce by folding the upper half on the lower: log2(lanes) steps, any association."""
    n = x.type.count
    while n > 1:
        n //= 2
        x = combine(pick(builder, x, x, range(n)), pick(builder, x, x, range(n, 2 * n)))
    return builder.extract_element(x, I32(0))


# ---- dot products: acc[i] += four products of bytes ------------------------------------------------------------------
def _vpdpbusd(builder, acc, u, s):
    u, s = builder.bitcast(u, acc.type), builder.bitcast(s, acc.type)
    return call(builder, f"llvm.x86.avx512.vpdpbusd.{32 * acc.type.count}", acc.type, acc, u, s)


def _pmadd(builder, acc, u, s):
    """Exact where u * s of neighbours add up to less than 2**15."""
    words = ir.VectorType(I16, 2 * acc.type.count)
    ssse3 = acc.type.count == 4
    pairs = call(builder, "llvm.x86.ssse3.pmadd.ub.sw.128" if ssse3 else "llvm.x86.avx2.pmadd.ub.sw", words, u, s)
    sums = call(builder, "llvm.x86.sse2.pmadd.wd" if ssse3 else "llvm.x86.avx2.pmadd.wd", acc.type, pairs, constant(words, 1))
    return builder.add(acc, sums)


def _pmadd_signed(builder, acc, w, s):
    """Signed bytes w: |w| * (s with the sign of w), at most 2 * 128 * 127 for two neighbours."""
    size = call(builder, f"llvm.abs.v{w.type.count}i8", w.type, w, ir.IntType(1)(0))
    psign = "llvm.x86.ssse3.psign.b.128" if w.type.count == 16 else "llvm.x86.avx2.psign.b"
    return _pmadd(builder, acc, size, call(builder, psign, w.type, s, w))


def _sdot(builder, acc, w, s):
    return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, w, s)


def _plain_dot(builder, acc, w, s):
    wide = ir.VectorType(I32, w.type.count)
    products = builder.mul(builder.sext(w, wide), builder.sext(s, wide))
    for j in range(4):
        acc = builder.add(acc, pick(builder, products, products, range(j, w.type.count, 4)))
    return acc


DOT4 = {"avx512": _vpdpbusd, "avxvnni": _vpdpbusd, "avx2": _pmadd, "neon": _sdot, "plain": _plain_dot}[MACHINE]
DOT8 = {"avx2": _pmadd_signed}.get(MACHINE, DOT4)


def _by_register(builder, dot, acc, w, s):
    n = acc.type.count
    piece = min(n, WIDTH)
    as_bytes = ir.VectorType(I8, 4 * n)
    w, s = builder.bitcast(w, as_bytes), builder.bitcast(s, as_bytes)
    return join(builder, [dot(builder, part(builder, acc, i, piece), part(builder, w, 4 * i, 4 * piece), part(builder, s, 4 * i, 4 * piece))
                          for i in range(0, n, piece)])


def dot4(builder, acc, codes, s):
    """Codes 0 ... 127, some machines more (CODE_TOP)."""
    return _by_register(builder, DOT4, acc, codes, s)


def dot8(builder, acc, codes, s):
    """Codes 0 ... 255, or -128 ... 127 where SIGNED_BYTES (s then -127 ... 127)."""
    return _by_register(builder, DOT8, acc, codes, s)


def lanes_of(builder, a, b, index):
    """Lane index[i] of a, then b, 16 lanes each."""
    if MACHINE == "avx512":
        return call(builder, "llvm.x86.avx512.vpermi2var.ps.512", a.type, a, index, b)
    both, out = pick(builder, a, b, range(32)), ir.Constant(a.type, ir.Undefined)
    for i in range(16):
        out = builder.insert_element(out, builder.extract_element(both, builder.extract_element(index, I32(i))), I32(i))
    return out


# ---- other operations that differ ------------------------------------------------------------------------------------
def broadcasts(builder, pointer, vec, count):
    """`vec`s filled with the `count` elements at pointer, one each; on NEON from loads of whole registers, because its dot
    products and multiplications take a lane as operand."""
    element, out = vec.element, []
    if MACHINE != "neon":
        pointer = builder.bitcast(pointer, element.as_pointer())
        return [splat(builder, vec, builder.load(builder.gep(pointer, [I64(i)]), align=1)) for i in range(count)]
    while count:
        n = 4 if count >= 4 else 2 if count >= 2 else 1
        pointer = builder.bitcast(pointer, element.as_pointer())
        group = load(builder, pointer, ir.VectorType(element, n))
        pointer, count = builder.gep(pointer, [I64(n)]), count - n
        out += [pick(builder, group, group, [i] * vec.count) for i in range(n)]
    return out


def fma(builder, a, b, c):
    """a * b + c, with one rounding where the machine has that."""
    return call(builder, f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)


def to_int(builder, x, vec):
    """To the nearest integer, ties to even."""
    if MACHINE == "neon" or MACHINE == "plain":
        even = call(builder, f"llvm.roundeven.v{vec.count}f32", x.type, x)
        return builder.fptosi(even, vec)
    return call(builder, f"llvm.lrint.v{vec.count}i32.v{vec.count}f32", vec, x)


def dot_float(builder, acc, vec):
    """float(acc - BIAS): a subtraction, where NEON's conversion is slow."""
    return builder.fsub(builder.bitcast(acc, vec), constant(vec, 12582912.0))


def from_half(builder, bits, vec):
    """IEEE halves, as i16 lanes, to f32."""
    if MACHINE != "plain":
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), vec.count)), vec)
    # Without an instruction LLVM would call a function that the process may lack. Halves are floats whose exponent is short
    # by 112: moving the bits and multiplying by 2**112 is exact, subnormals included.
    wide = ir.VectorType(I32, vec.count)
    x = builder.zext(bits, wide)
    size = builder.shl(builder.and_(x, constant(wide, 0x7FFF)), constant(wide, 13))
    value = builder.bitcast(builder.fmul(builder.bitcast(size, vec), constant(vec, 2.0 ** 112)), wide)
    special = builder.icmp_unsigned(">=", size, constant(wide, 0x0F800000))  # infinity, NaN
    value = builder.select(special, builder.or_(value, constant(wide, 0x7F800000)), value)
    sign = builder.shl(builder.and_(x, constant(wide, 0x8000)), constant(wide, 16))
    return builder.bitcast(builder.or_(value, sign), vec)
