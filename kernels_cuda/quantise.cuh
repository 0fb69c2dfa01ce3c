// Activations to int8 per token and block of K, the reference's arithmetic (division included, so that both round alike), in the order in
// which codes of weights meet them: units of 32 K (16 where a block is 16). 4-bit weights hold two neighbours in a byte, so a unit has
// its even k first, then its odd ones; 8-bit weights take them as they come. 2 and 3 bits: of each 16 the k that are 0 modulo 4, then those
// that are 1, 2 and 3.
#pragma once
#include "common.cuh"

#define MAGIC 0x4b400000             // the bits of 12582912: an int sum of less than 2^22 added to them is a float without conversion
#define MAGIC_FLOAT 12582912.0f

// What the unit's dot product needs besides its codes.
struct UnitInfo {
    float scale;
    // of the dot product with weights whose zero point is the default, ZERO: MAGIC - ZERO * sum of the codes
    i32 start;
};

template <int BITS> constexpr i32 ZERO = 1 << (BITS - 1);

// The start where a block has a zero point of its own.
template <int BITS> __device__ __forceinline__ i32 start_of(i32 start, i32 zero_point)
{
    return start - (zero_point - ZERO<BITS>) * ((MAGIC - start) >> (BITS - 1));
}

// The eight values from x[first] on, zeros past k. ALIGNED: x is 16-byte aligned, and k a multiple of 8.
template <bool ALIGNED> __device__ __forceinline__ void load8(float (&v)[8], const float* x, int first, int k)
{
    if (ALIGNED) {
        float4 a = make_float4(0, 0, 0, 0), b = a;
        if (first < k) a = *(const float4*)(x + first), b = *(const float4*)(x + first + 4);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = first + i < k ? x[first + i] : 0.0f;
    }
}

// top / 127 and its inverse, correctly rounded: Newton steps in place of divisions, whose slow paths are branches
__device__ __forceinline__ void scale_of(float top, float& scale, float& inverse)
{
    top = fmaxf(top, 1e-20f);
    const float guess = top * (1 / 127.0f);
    scale = __fmaf_rn(__fmaf_rn(-guess, 127.0f, top), 1 / 127.0f, guess);
    asm("rcp.approx.f32 %0, %1;" : "=f"(inverse) : "f"(scale));
    inverse = __fmaf_rn(__fmaf_rn(-scale, inverse, 1.0f), inverse, inverse);
}

// The largest of each of the BATCH blocks that this lane has eight values of, in a warp that is here as a whole: UNIT / 8 << block_shift
// neighbouring lanes share a block. All of them before any is used, so that larger blocks than units are one branch, which no lane takes
// alone, and work on several units stays free to overlap.
template <int UNIT, int BATCH>
__device__ __forceinline__ void tops_of(float (&top)[BATCH], const float (&v)[BATCH][8], int block_shift)
{
    constexpr int PARTS = UNIT / 8;
#pragma unroll
    for (int b = 0; b < BATCH; b++) {
        top[b] = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) top[b] = fmaxf(top[b], fabsf(v[b][i]));
#pragma unroll
        for (int step = 1; step < PARTS; step <<= 1) top[b] = fmaxf(top[b], __shfl_xor_sync(FULL_WARP, top[b], step));
    }
    if (UNIT == 16 || block_shift == 0) return;
#pragma unroll 1
    for (int step = PARTS; step < PARTS << block_shift; step <<= 1)
#pragma unroll
        for (int b = 0; b < BATCH; b++) top[b] = fmaxf(top[b], __shfl_xor_sync(FULL_WARP, top[b], step));
}

// Eight values of a block whose largest is `top` to codes: `low` the first four or the even ones, `high` the others.
template <int BITS>
__device__ __forceinline__ void quantise8(const float (&v)[8], float top, u32& low, u32& high, float& scale, i32& sum)
{
    float inverse;
    scale_of(top, scale, inverse);
    u32 code[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {    // v / scale, correctly rounded: one Newton step from the rounded inverse (Markstein)
        const float guess = v[i] * inverse;
        const float quotient = __fmaf_rn(__fmaf_rn(-guess, scale, v[i]), inverse, guess);
        code[i] = __float_as_uint(quotient + MAGIC_FLOAT);  // rounds to even; the low byte is the code
    }
    constexpr int NEXT = BITS == 4 ? 2 : 1, HIGH = BITS == 4 ? 1 : 4;
    low = __byte_perm(__byte_perm(code[0], code[NEXT], 0x0040), __byte_perm(code[2 * NEXT], code[3 * NEXT], 0x0040), 0x5410);
    high = __byte_perm(__byte_perm(code[HIGH], code[HIGH + NEXT], 0x0040),
                       __byte_perm(code[HIGH + 2 * NEXT], code[HIGH + 3 * NEXT], 0x0040), 0x5410);
    sum = dot_signed(low, 0x01010101, dot_signed(high, 0x01010101, 0));
}

// A unit, whose values UNIT / 8 neighbouring lanes hold (this one part `part`), of a block whose largest is `top`, by a warp that is here
// as a whole. Writes its codes if asked to, and returns its info in each of these lanes.
template <int BITS, int UNIT>
__device__ __forceinline__ UnitInfo quantise_unit(const float (&v)[8], float top, int part, u32* codes, bool write)
{
    constexpr int PARTS = UNIT / 8;
    u32 low, high;
    i32 sum;
    UnitInfo info;
    quantise8<BITS>(v, top, low, high, info.scale, sum);
    if (BITS < 4) {  // of two lanes' eight each, the even one keeps phases 0 and 1, the odd one 2 and 3
        const bool odd = part & 1;
        const u32 first = __byte_perm(low, high, 0x5140), second = __byte_perm(low, high, 0x7362);
        const u32 got = __shfl_xor_sync(FULL_WARP, odd ? first : second, 1), own = odd ? second : first;
        low = __byte_perm(odd ? got : own, odd ? own : got, 0x5410), high = __byte_perm(odd ? got : own, odd ? own : got, 0x7632);
    }
    if (write && BITS == 4) {
        codes[part] = low;
        codes[PARTS + part] = high;
    } else if (write) {
        *(uint2*)&codes[2 * part] = make_uint2(low, high);
    }
#pragma unroll
    for (int step = 1; step < PARTS; step <<= 1) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    info.start = MAGIC - ZERO<BITS> * sum;
    return info;
}
