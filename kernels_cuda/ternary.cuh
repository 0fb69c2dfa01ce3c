// Ternary weights of two bits, w + 2, in panels of 16 outputs (see the reference of matmul_ternary): a step is 64 bytes, a word of 4 bytes
// for each output; field f (bits 2f, 2f + 1) of byte j is k = 4 * j + f of the step's 16. Activations are integers of a byte: of each
// step word f holds k = f, f + 4, f + 8, f + 12, as the fields f do.
#pragma once
#include "common.cuh"

#define CENTRE 2  // the code of a weight 0
#define MOST_WARPS 8

// What a token's sums need besides its codes.
struct TokenInfo {
    float factor;  // by which the token was multiplied
    i32 centre;    // CENTRE * sum of its codes
};

// What a sum of codes' products stands for.
__device__ __forceinline__ float finish(i32 sum, TokenInfo token, float scale, float bias)
{
    return __fdiv_rn((float)(sum - token.centre), token.factor) * scale + bias;
}

// of() over all threads of the block, which must all be here; what they wrote to shared memory before is there for all. shared holds a
// value of each warp, and is free again after the block's next barrier.
template <class T, class Of> __device__ __forceinline__ T over_block(T mine, T* shared, Of of)
{
#pragma unroll
    for (int step = 16; step; step >>= 1) mine = of(mine, __shfl_xor_sync(FULL_WARP, mine, step));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    mine = shared[0];
    for (int w = 1; w < blockDim.x / 32; w++) mine = of(mine, shared[w]);
    return mine;
}

// x[first ...], zeros from k on
__device__ __forceinline__ float4 load4(const float* x, int first, int k, bool aligned)
{
    if (aligned) return first < k ? *(const float4*)(x + first) : make_float4(0, 0, 0, 0);
    return make_float4(first < k ? x[first] : 0.0f, first + 1 < k ? x[first + 1] : 0.0f, first + 2 < k ? x[first + 2] : 0.0f,
                       first + 3 < k ? x[first + 3] : 0.0f);
}

#define HELD 4  // float4 of a thread that are read once

// A token by all threads of a block: the reference's quantise_tokens. codes: 4 * steps words, zeros past k.
__device__ __forceinline__ TokenInfo quantise_token(const float* x, int k, int steps, int bits, u32* codes)
{
    __shared__ double shared[MOST_WARPS];
    __shared__ i32 sums[MOST_WARPS];
    const bool aligned = ((u64)x & 15) == 0 && k % 4 == 0;
    float4 held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) held[i] = load4(x, 4 * (threadIdx.x + i * blockDim.x), k, aligned);
    const auto again = [&](int i) { return load4(x, 4 * (threadIdx.x + i * blockDim.x), k, aligned); };
    const int count = (steps * 4 + blockDim.x - 1) / blockDim.x;
    float factor;
    if (bits == 8) {
        float top = 0;
        const auto look = [&](float4 v) { top = fmaxf(fmaxf(top, fmaxf(fabsf(v.x), fabsf(v.y))), fmaxf(fabsf(v.z), fabsf(v.w))); };
#pragma unroll
        for (int i = 0; i < HELD; i++) look(held[i]);
        for (int i = HELD; i < count; i++) look(again(i));
        top = over_block(top, (float*)shared, [](float a, float b) { return fmaxf(a, b); });
        factor = __fdiv_rn(127.0f, fmaxf(top, 1e-5f));
    } else {
        double total = 0;
        for (int i = threadIdx.x; i < k; i += blockDim.x) total += fabsf(x[i]);
        total = over_block(total, shared, [](double a, double b) { return a + b; });
        factor = __fdiv_rn(__fsqrt_rn(7.0f), fmaxf((float)(total / k), 1e-5f));
    }
    const float most = (float)((1 << (bits - 1)) - 1);
    const int lane = threadIdx.x % 32, own = lane % 4;
    i32 sum = 0;
    const auto write = [&](int i, float4 four) {  // four lanes share a step
        const float v[4] = {four.x, four.y, four.z, four.w};
        u32 mine = 0, word = 0;
#pragma unroll
        for (int f = 0; f < 4; f++) mine |= (u32)((i32)fminf(fmaxf(rintf(v[f] * factor), -most - 1), most) & 255) << 8 * f;
        sum = dot_signed(mine, 0x01010101, sum);
#pragma unroll
        for (int j = 0; j < 4; j++) word |= (__shfl_sync(FULL_WARP, mine, lane - own + j) >> 8 * own & 255) << 8 * j;
        const int at = threadIdx.x + i * blockDim.x;
        if (at < steps * 4) codes[at] = word;
    };
#pragma unroll
    for (int i = 0; i < HELD; i++) write(i, held[i]);
    for (int i = HELD; i < count; i++) write(i, again(i));
    sum = over_block(sum, sums, [](i32 a, i32 b) { return a + b; });
    return {factor, CENTRE * sum};
}
