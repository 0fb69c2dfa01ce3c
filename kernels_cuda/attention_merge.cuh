// Partial results of ranges of pages, and the output of a query head made of them (flash decoding).
#pragma once
#include "attention_call.cuh"

#define HEADS 8          // query heads that a block takes
#define MOST_RANGES 128

// Of each (place, KV head, range) and query head, a place being a sequence or a row: weighted values [D], log2 of the reference, sum of weights, two to spare.
__device__ __forceinline__ float* partial_of(const Call& call, int ranges, int place, int head, int range, int h)
{
    return at<float>(call.workspace) + (((i64)(place * call.kv_heads + head) * ranges + range) * call.group() + h) * (call.head_dim + 4);
}

__device__ __forceinline__ float load_shared_by_all(const float* p)  // past the first-level cache: another processor wrote it
{
    float x;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(p));
    return x;
}

__device__ __forceinline__ float4 load_four(const float* p)
{
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p));
    return x;
}

__device__ u32 arrived[1 << 16];  // ranges that are done, of each sequence and KV head

// Whether this block is the last of `expected` ones to come here; what the others wrote is then visible. The count starts anew.
__device__ __forceinline__ bool last_to_arrive(int index, int expected)
{
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&arrived[index], 1) == expected - 1;
        if (last) arrived[index] = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// All threads of a block, with q [heads][stride] rotated, times the scale and log2 e in shared memory: the output of one row, of the query heads
// first ... first + heads of a KV head's group. weights: shared memory, [HEADS][MOST_RANGES + 2] floats.
__device__ __forceinline__ void merge_ranges(const Call& call, int place, int s, int head, int first, int heads, int row, int ranges, int used,
                                             const float* q, int stride, float* weights)
{
    const int depth = (int)call.head_dim, lane = threadIdx.x % 32;
    const float* held = call.dropped(s, head);
    const i64 next = (i64)call.group() * (depth + 4);  // floats from one range to the next
    __syncthreads();
    for (int h = threadIdx.x / 32; h < heads; h += blockDim.x / 32) {
        const float* partial = partial_of(call, ranges, place, head, 0, first + h) + depth;
        float* own = weights + h * (MOST_RANGES + 2);
        float best = LOWEST, extra = LOWEST, total = 0;
        for (int r = lane; r < used; r += 32) own[r] = load_shared_by_all(partial + r * next), best = fmaxf(best, own[r]);
        if (held) {
            float x = 0;
            for (int c = lane; c < depth; c += 32) x += q[h * stride + c] * held[1 + c];
            extra = warp_sum(x) + log2f(held[0]);
        }
        best = fmaxf(warp_max(best), extra);
        for (int r = lane; r < used; r += 32) own[r] = exp2f(own[r] - best), total += own[r] * load_shared_by_all(partial + r * next + 1);
        const float dropped = held ? exp2f(extra - best) : 0;
        total = warp_sum(total) + dropped;
        if (lane == 0) own[MOST_RANGES] = dropped, own[MOST_RANGES + 1] = total > 0 ? 1 / total : 0;
    }
    __syncthreads();
    for (int n = threadIdx.x; n < heads * depth / 4; n += blockDim.x) {
        const int h = n / (depth / 4), c = n % (depth / 4) * 4;
        const float* partial = partial_of(call, ranges, place, head, 0, first + h) + c;
        const float* own = weights + h * (MOST_RANGES + 2);
        float4 x = make_float4(0, 0, 0, 0);
        if (held) {
            const float* mean = held + 1 + depth + c;
            const float w = own[MOST_RANGES];
            x = make_float4(w * mean[0], w * mean[1], w * mean[2], w * mean[3]);
        }
#pragma unroll 8
        for (int r = 0; r < used; r++) {
            const float4 y = load_four(partial + r * next);
            x.x += own[r] * y.x, x.y += own[r] * y.y, x.z += own[r] * y.z, x.w += own[r] * y.w;
        }
        const float inverse = own[MOST_RANGES + 1];
        float* to = at<float>(call.out) + row * call.out_stride + (head * call.group() + first + h) * depth + c;
        to[0] = x.x * inverse, to[1] = x.y * inverse, to[2] = x.z * inverse, to[3] = x.w * inverse;
    }
}
