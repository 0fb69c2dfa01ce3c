// Pages by the product of their mean key with the mean of some queries: of a KV head's query heads as scores, of one as weights that
// pick() takes.
#pragma once
#include "prefill_choice.cuh"

#define MOST_DEPTH 256
#define HEADS 8

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
    if (call.keys_rotated) hadamard(query, 1, depth, MOST_DEPTH);
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

// Scores in powers of 2 as their softmax, by a block of CHOICE_THREADS.
__device__ __forceinline__ void scores_to_weights(Totals& room, float* scores, int pages)
{
    float top = LOWEST, total = 0;
    for (int p = threadIdx.x; p < pages; p += CHOICE_THREADS) top = fmaxf(top, scores[p]);
    top = block_max(room, top);
    for (int p = threadIdx.x; p < pages; p += CHOICE_THREADS) total += exp2f(scores[p] - top);
    const float factor = 1 / block_sums(room, total, 0).x;
    for (int p = threadIdx.x; p < pages; p += CHOICE_THREADS) scores[p] = exp2f(scores[p] - top) * factor;
}

// By a block of CHOICE_THREADS: scores [group], `stride` apart, of `pages` pages with the mean of `rows` rows from `first` on, in powers of
// 2. queries: room for the heads' channels, in shared memory. A barrier at the end.
__device__ __forceinline__ void score_means(const Call& call, const QueryBlock& here, int head, int first, int rows, int pages, i64 means,
                                            float (*queries)[MOST_DEPTH], float* scores, i64 stride)
{
    const int depth = (int)call.head_dim, group = call.group(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int n = threadIdx.x; n < group * depth; n += CHOICE_THREADS) {
        const int c = n % depth;
        const float* x = at<float>(call.q) + first * call.q_stride + head * group * depth + n - c;
        float sum = 0;
#pragma unroll 4
        for (int r = 0; r < rows; r++) sum += rotated(call, x + r * call.q_stride, at<i64>(call.positions)[first + r], c);
        queries[n / depth][c] = sum / rows * call.scale() * LOG2E;
    }
    if (call.keys_rotated) hadamard(&queries[0][0], group, depth, MOST_DEPTH);
    __syncthreads();
    for (int p = warp; p < pages; p += CHOICE_WARPS) {
        const float* mean = at<float>(means) + ((here.page_place + p) * call.kv_heads + head) * depth;
        float score[HEADS] = {};
        for (int c = lane; c < depth; c += 32) {
            const float x = mean[c];
#pragma unroll
            for (int h = 0; h < HEADS; h++) score[h] = h < group ? fmaf(queries[h][c], x, score[h]) : 0;
        }
#pragma unroll
        for (int h = 0; h < HEADS; h++)
            if (h < group) {
                const float sum = warp_sum(score[h]);
                if (lane == 0) scores[h * stride + p] = sum;
            }
    }
    __syncthreads();
}
