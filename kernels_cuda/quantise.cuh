// Activations to int8 per token and block of K, the reference's arithmetic (division included, so that both round alike), in the order in
// which codes of weights meet them: units of 32 K (16 where a block is 16). 4-bit weights hold two neighbours in a byte, so a unit has its even
// k first, then its odd ones; 8-bit weights take them as they come.
#pragma once
#include "common.cuh"

#define MAGIC 0x4b400000             // the bits of 12582912: an int sum of less than 2^22 added to them is a float without conversion
#define MAGIC_FLOAT 12582912.0f

// What the unit's dot product needs besides its codes.
struct UnitInfo {
    float scale;
    i32 sum;                         // of the codes
};

// The eight k from `first` on, one lane of the `lanes` neighbours that share a block. codes: lower word the even or first k, upper the others.
template <int BITS>
__device__ __forceinline__ void quantise8(const float* x, int first, int k, int lanes, u32& low, u32& high, float& scale, i32& sum)
{
    float v[8], top = 0;
    if (first + 8 <= k && ((u64)x & 15) == 0) {
        const float4 a = *(const float4*)(x + first), b = *(const float4*)(x + first + 4);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = first + i < k ? x[first + i] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) top = fmaxf(top, fabsf(v[i]));
    for (int step = 1; step < lanes; step <<= 1) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, step));
    scale = __fdiv_rn(fmaxf(top, 1e-20f), 127.0f);
    const float inverse = __frcp_rn(scale);
    u32 code[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {    // v / scale, correctly rounded: one Newton step from the rounded inverse (Markstein)
        const float guess = v[i] * inverse;
        const float quotient = __fmaf_rn(__fmaf_rn(-guess, scale, v[i]), inverse, guess);
        code[i] = __float_as_uint(quotient + MAGIC_FLOAT);  // rounds to even; the low byte is the code
    }
    const int order[8] = {0, BITS == 4 ? 2 : 1, BITS == 4 ? 4 : 2, BITS == 4 ? 6 : 3, BITS == 4 ? 1 : 4, BITS == 4 ? 3 : 5, BITS == 4 ? 5 : 6, 7};
    low = __byte_perm(__byte_perm(code[order[0]], code[order[1]], 0x0040), __byte_perm(code[order[2]], code[order[3]], 0x0040), 0x5410);
    high = __byte_perm(__byte_perm(code[order[4]], code[order[5]], 0x0040), __byte_perm(code[order[6]], code[order[7]], 0x0040), 0x5410);
    sum = dot_signed(low, 0x01010101, dot_signed(high, 0x01010101, 0));
}

// Unit `unit` of a row, by UNIT / 8 neighbouring lanes of a warp that is here as a whole; `part` says which of them. Writes the unit's codes and
// returns its info in each of these lanes. Lanes whose unit is past the end compute on zeros and write nothing.
template <int BITS, int UNIT>
__device__ __forceinline__ UnitInfo quantise_unit(const float* x, int unit, int part, int k, int block_shift, u32* codes, bool write)
{
    constexpr int PARTS = UNIT / 8;
    u32 low, high;
    UnitInfo info;
    quantise8<BITS>(x, unit * UNIT + part * 8, k, PARTS << block_shift, low, high, info.scale, info.sum);
    if (write && BITS == 4) {
        codes[part] = low;
        codes[PARTS + part] = high;
    } else if (write) {
        codes[2 * part] = low;
        codes[2 * part + 1] = high;
    }
#pragma unroll
    for (int step = 1; step < PARTS; step <<= 1) info.sum += __shfl_xor_sync(FULL_WARP, info.sum, step);
    return info;
}
