// Pages by the product of their mean key with the mean of a block's queries, for one query head, as weights that pick() takes.
#pragma once
#include "prefill_choice.cuh"

#define MOST_DEPTH 256

// Order as it was, of floats that are not negative (to the last bit but one).
__device__ __forceinline__ float ordered(float x)
{
    const u32 bits = (u32)__float_as_int(x);
    return __int_as_float((int)((bits >> 31 ? ~bits : bits | 0x80000000u) >> 1));
}

// By a block of CHOICE_THREADS: weights [pages], query, room for a head's channels, both in shared memory; means: prefill_call.mean_keys.
__device__ __forceinline__ void weigh_means(const Call& call, const QueryBlock& here, int s, int head, i64 means, float* query,
                                            float* weights)
{
    const int depth = (int)call.head_dim, first = call.first_row(s) + here.first, kv_head = head / call.group();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    for (int c = threadIdx.x; c < depth; c += CHOICE_THREADS) {
        const float* x = at<float>(call.q) + first * call.q_stride + head * depth;
        float sum = 0;
#pragma unroll 4
        for (int r = 0; r < here.rows; r++) sum += rotated(call, x + r * call.q_stride, at<i64>(call.positions)[first + r], c);
        query[c] = sum / here.rows;
    }
    __syncthreads();
    for (int p = warp; p < here.pages; p += CHOICE_WARPS) {
        const float* mean = at<float>(means) + ((here.page_place + p) * call.kv_heads + kv_head) * depth;
        float score = 0;
        for (int c = lane; c < depth; c += 32) score = fmaf(query[c], mean[c], score);
        score = warp_sum(score);
        if (lane == 0) weights[p] = ordered(score);
    }
    __syncthreads();
}
