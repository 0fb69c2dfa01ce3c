// What a product with one token does besides, so that a decode step has fewer kernels to run one after the other: normalise its row first,
// add another row or multiply by an activated gate afterwards. What the steps in its place would have written is written too, so that
// whoever reads it finds it. Pointers are null where nothing is to be done.
#pragma once
#include "activation.cuh"
#include "normalization.cuh"
#include "quantise.cuh"

struct Around {  // fused_steps.py's AROUND
    const float* gain;                    // x is normalised by it, into `normal`
    float* normal;
    const float* other;                   // the product plus `other`: `sum`
    float* sum;
    float* gated;                         // activation(first half of the product) * second half
    float epsilon;
    int activation, half, spare;          // half: panels of gates, each of which is followed by its other half's; 0: there are no gates
};
static_assert(sizeof(Around) == 56, "as fused_steps.py writes it");

// Panels in the order in which a team has them: every stride-th, or every stride-th pair of a gate's panel and its other half's.
__device__ __forceinline__ int panel_of(int place, int half) { return half ? (place >> 1) + (place & 1) * half : place; }
__device__ __forceinline__ int next_place(int place, int half, int stride)
{
    return place + (half ? place & 1 ? 2 * stride - 1 : 1 : stride);
}

// A row of activations to shared memory, by all warps of the block. The way to x is long: FAST, for aligned rows, loads BATCH rounds at
// once and works on them without branches, so that they overlap. then() is called once the first loads are under way.
template <int BITS, int UNIT, bool FAST, int BATCH, class Then>
__device__ __forceinline__ void quantise_row(const float* x, int k, int units, int block_shift, u32* codes, UnitInfo* info, Then then)
{
    constexpr int PARTS = UNIT / 8, PER_WARP = 32 / PARTS;
    const int round = blockDim.x / PARTS, lane = threadIdx.x & 31, part = lane % PARTS, begin = threadIdx.x / 32 * PER_WARP;
    if (begin >= units) then();
#pragma unroll 1
    for (int first = begin; first < units; first += BATCH * round) {
        float v[BATCH][8], top[BATCH];
        UnitInfo made[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) load8<FAST>(v[i], x, (first + i * round + lane / PARTS) * UNIT + part * 8, k);
        if (first == begin) then();
        tops_of<UNIT>(top, v, block_shift);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int unit = first + i * round + lane / PARTS;
            made[i] = quantise_unit<BITS, UNIT>(v[i], top[i], part, codes + unit * (UNIT / 4), unit < units);
        }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            const int unit = first + i * round + lane / PARTS;
            if (unit < units && part == 0) info[unit] = made[i];
        }
    }
}

// quantise_row() for a row that is normalised on the way, by all threads of a block, each of which has 8 * BATCH values at
// most. sums: shared, a float for each warp. Aligned rows.
template <int BITS, int UNIT, int BATCH, class Then>
__device__ __forceinline__ void quantise_normal(const float* x, const Around& around, int k, int units, int block_shift, u32* codes,
                                                UnitInfo* info, float* sums, Then then)
{
    constexpr int PARTS = UNIT / 8;
    const int round = blockDim.x / PARTS, lane = threadIdx.x & 31, part = lane % PARTS, first = threadIdx.x / PARTS;
    float v[BATCH][8], gain[BATCH][8], top[BATCH], total = 0;
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
        const int at = (first + i * round) * UNIT + part * 8;
        load8<true>(v[i], x, at, k), load8<true>(gain[i], around.gain, at, k);
    }
    then();
#pragma unroll
    for (int i = 0; i < BATCH; i++)
#pragma unroll
        for (int e = 0; e < 8; e++) total += v[i][e] * v[i][e];
    total = warp_sum(total);
    if (lane == 0) sums[threadIdx.x / 32] = total;
    __syncthreads();
    const float factor = factor_of(warp_sum(lane < blockDim.x / 32 ? sums[lane] : 0.0f), k, around.epsilon);
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
        const int at = (first + i * round) * UNIT + part * 8;
#pragma unroll
        for (int e = 0; e < 8; e++) v[i][e] = v[i][e] * factor * gain[i][e];
        if (blockIdx.x == 0 && at < k) {
            *(float4*)(around.normal + at) = make_float4(v[i][0], v[i][1], v[i][2], v[i][3]);
            *(float4*)(around.normal + at + 4) = make_float4(v[i][4], v[i][5], v[i][6], v[i][7]);
        }
    }
    tops_of<UNIT>(top, v, block_shift);
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
        const int unit = first + i * round;
        const UnitInfo made = quantise_unit<BITS, UNIT>(v[i], top[i], part, codes + unit * (UNIT / 4), unit < units);
        if (unit < units && part == 0) info[unit] = made;
    }
}

// The row of a product with one token, to shared memory, by all threads of the block. sums: shared, a float for each warp.
template <int BITS, int UNIT, class Then>
__device__ __forceinline__ void quantise_own(const float* x, const Around& around, int k, int units, int block_shift, u32* codes,
                                             UnitInfo* info, float* sums, Then then)
{
    constexpr int PARTS = UNIT / 8;
    const bool fast = ((u64)x & 15) == 0 && k % 8 == 0;
    if (around.gain && units * PARTS <= blockDim.x)
        quantise_normal<BITS, UNIT, 1>(x, around, k, units, block_shift, codes, info, sums, then);
    else if (around.gain)
        quantise_normal<BITS, UNIT, 4>(x, around, k, units, block_shift, codes, info, sums, then);
    else if (!fast)
        quantise_row<BITS, UNIT, false, 1>(x, k, units, block_shift, codes, info, then);
    else if (units * PARTS <= 2 * blockDim.x)
        quantise_row<BITS, UNIT, true, 2>(x, k, units, block_shift, codes, info, then);
    else if (units * PARTS <= 4 * blockDim.x)
        quantise_row<BITS, UNIT, true, 4>(x, k, units, block_shift, codes, info, then);
    else
        quantise_row<BITS, UNIT, true, 7>(x, k, units, block_shift, codes, info, then);
    __syncthreads();
}
