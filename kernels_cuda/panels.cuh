// Block-quantised weights in panels of 16 outputs, as they are stored (see the reference of matmul_nbits); matmul_nbits.py's WEIGHTS.
#pragma once
#include "common.cuh"

struct Weights {
    const u8* codes;
    const u16* scales;
    const u8* zero_points;           // null: the default everywhere
    int units, block_shift, panels;  // units (of 32 K, or of 16 where blocks are) of a panel; log2 of the units in a block
    int halves;                      // whether zero points are halves, not bytes: of kernels that take ANY zero points
};

// Bytes from a panel's first step to the steps of 3-bit codes: the low bits of a unit's two steps, and the third bits of both, which stand
// behind the low ones of their block.
__device__ __forceinline__ i64 low_steps(const Weights& w, int panel, int unit)
{
    const int inner = unit & (1 << w.block_shift) - 1;
    return ((i64)panel * w.units + unit - inner) * 192 + inner * 128;
}
__device__ __forceinline__ i64 third_step(const Weights& w, int panel, int unit)
{
    const int inner = unit & (1 << w.block_shift) - 1;
    return ((i64)panel * w.units + unit - inner + (1 << w.block_shift)) * 192 - (64 << w.block_shift) + inner * 64;
}

// Four codes of 2 or 3 bits of one output, phase p of a step (the reference of matmul_nbits): low bits, and the word of third bits.
template <int BITS> __device__ __forceinline__ u32 four_codes(u32 low, u32 third, int step, int p)
{
    const u32 two = low >> 2 * p & 0x03030303;
    return BITS == 3 ? two | (third >> p + 4 * step & 0x01010101) << 2 : two;
}
