// Activations of whole tokens to integers under one factor, for products with ternary weights: the reference's quantise_tokens.
//
// x float32. codes: i8 [tokens, 16 * steps]: of each step of 16 K word f holds k = f, f + 4, f + 8, f + 12, as the fields f of a word of
// two-bit weights do; zeros past k. info: TokenInfo [tokens]. Block: 256 threads; grid: (tokens).
#include "ternary.cuh"

#define WARPS 8

// a value that depends on all threads of the block: of(warp's value, another warp's) over the warps
template <class T, class Of> __device__ __forceinline__ T over_warps(T mine, T (&shared)[WARPS], Of of)
{
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
    __syncthreads();
    T all = shared[0];
    for (int w = 1; w < WARPS; w++) all = of(all, shared[w]);
    __syncthreads();
    return all;
}

KERNEL __launch_bounds__(256) quantise_tokens(const float* x, i64 x_stride, uint4* codes, TokenInfo* info, const i64* state, int tokens_at,
                                              int k, int steps, int bits)
{
    __shared__ float tops[WARPS];
    __shared__ double totals[WARPS];
    __shared__ i32 sums[WARPS];
    const i64 count = state[tokens_at];
    release_next();
    wait_previous();
    const int token = blockIdx.x;
    if (token >= count) return;
    x += token * x_stride;
    float factor;
    if (bits == 8) {
        float top = 0;
        for (int i = threadIdx.x; i < k; i += blockDim.x) top = fmaxf(top, fabsf(x[i]));
        top = over_warps(warp_max(top), tops, [](float a, float b) { return fmaxf(a, b); });
        factor = __fdiv_rn(127.0f, fmaxf(top, 1e-5f));
    } else {
        double total = 0;
        for (int i = threadIdx.x; i < k; i += blockDim.x) total += fabsf(x[i]);
        for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(FULL_WARP, total, step);
        total = over_warps(total, totals, [](double a, double b) { return a + b; });
        factor = __fdiv_rn(__fsqrt_rn(7.0f), fmaxf((float)(total / k), 1e-5f));
    }
    const float most = (float)((1 << (bits - 1)) - 1);
    i32 sum = 0;
    for (int step = threadIdx.x; step < steps; step += blockDim.x) {
        u32 words[4] = {};
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float v = step * 16 + i < k ? x[step * 16 + i] : 0.0f;
            const i32 code = (i32)fminf(fmaxf(rintf(v * factor), -most - 1), most);
            words[i % 4] |= (u32)(code & 255) << 8 * (i / 4);
        }
#pragma unroll
        for (int f = 0; f < 4; f++) sum = dot_signed(words[f], 0x01010101, sum);
        codes[(i64)token * steps + step] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    sum = over_warps(sum, sums, [](i32 a, i32 b) { return a + b; });
    if (threadIdx.x == 0) info[token] = {factor, CENTRE * sum};
}
