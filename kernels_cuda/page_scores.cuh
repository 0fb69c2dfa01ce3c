// Kernels that score pages before select_pages chooses by them (page_scores.py).
#pragma once
#include "page_values.cuh"
#include "selection.cuh"

#define WARPS (SELECT_THREADS / 32)
#define SCORING_WITH(name, more) \
    extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 1) name(CALL_PARAMETERS SELECTION_ARGS(AS_PARAMETER) more i64 parts)
#define SCORING(name) SCORING_WITH(name, )
#define MAKE_SELECTION Selection{MAKE_CALL, SELECTION_ARGS(AS_VALUE)}

// Four channels of a token's key in codes of 4 bits by channel, which lie together.
__device__ __forceinline__ float4 four_codes(i64 from, i64 params, int depth, int quad, int t)
{
    const u32 codes = at<u32>(from)[16 * quad + t % 16] >> t / 16 * 4;
    const uint2 lows = at<uint2>(params)[quad], steps = at<uint2>(params)[depth / 4 + quad];
    const float2 low = halves_to_floats(lows.x), more = halves_to_floats(lows.y);
    const float2 step = halves_to_floats(steps.x), next = halves_to_floats(steps.y);
    return make_float4(fmaf((float)(codes & 15), step.x, low.x), fmaf((float)(codes >> 8 & 15), step.y, low.y),
                       fmaf((float)(codes >> 16 & 15), next.x, more.x), fmaf((float)(codes >> 24 & 15), next.y, more.y));
}

// The same in a page of any format.
__device__ __forceinline__ float4 four_keys(const Page& page, int depth, int quad, int t)
{
    if (page.kind(K_KIND) == INT4 && page.kind(K_AXIS) == BY_ROW) return four_codes(page.place(K), page.place(K_PARAMS), depth, quad, t);
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = key_at(page, depth, 4 * quad + i, t);
    return make_float4(x[0], x[1], x[2], x[3]);
}

// Queries first ... first + heads of a sequence's only row, times the scale, to shared memory, turned as the cache's keys are or by their
// position alone. By all threads.
__device__ __forceinline__ void prepare_queries(const Call& call, int s, int first, int heads, float* q, bool as_keys = true)
{
    const int depth = (int)call.head_dim, row = call.first_row(s);
    const float* x = at<float>(call.q) + row * call.q_stride + first * depth;
    for (int n = threadIdx.x; n < heads * depth; n += SELECT_THREADS)
        q[n] = rotated(call, x + n / depth * depth, at<i64>(call.positions)[row], n % depth) * call.scale();
    if (as_keys && call.keys_rotated) hadamard(q, heads, depth, depth);
    __syncthreads();
}
