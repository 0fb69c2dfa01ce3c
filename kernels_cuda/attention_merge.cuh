// Partial results of ranges of pages, and the output of a query head made of them (flash decoding).
#pragma once
#include "attention_call.cuh"
#include "last_block.cuh"

#define HEADS 8          // query heads that a block takes
#define MOST_RANGES 130  // and the newest token
#define MOST_ITEMS 4     // of four channels that a thread merges: 8 heads of 256 channels by 128 threads
#define MERGE_FLOATS (HEADS * (MOST_RANGES + 2) + 4 * 256 + HEADS * (256 + 4))  // weights, parts of sums, and a range's partial result

// Of each (place, KV head, range) and query head, a place being a sequence or a row: weighted values [D], log2 of the reference, sum of
// weights, two to spare.
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

// All threads of a block, with q [heads][stride] rotated, times the scale and log2 e in shared memory: the output of one row, of the query
// heads first ... first + heads of a KV head's group. room: shared memory, `floats` of them (MERGE_FLOATS at least), which partial results
// are copied to, as many ranges at once as there is room for: so each thread waits for memory once, however many ranges there are.
__device__ __forceinline__ void merge_ranges(const Call& call, int place, int s, int head, int first, int heads, int row, int ranges,
                                             int used, const float* q, int stride, float* room, int floats)
{
    const int depth = (int)call.head_dim, lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int pieces = depth / 4, items = heads * pieces, width = heads * (depth + 4);
    const float* held = call.dropped(s, head);
    const float* partials = partial_of(call, ranges, place, head, 0, first);
    const int next = call.group() * (depth + 4);  // floats from one range to the next
    float* staged = room + HEADS * (MOST_RANGES + 2) + 4 * 256;
    const int together = (floats - HEADS * (MOST_RANGES + 2) - 4 * 256) / width;
    __syncthreads();
    auto fetch = [&](int r0) {
        for (int r = warp; r < together && r0 + r < used; r += warps)
            for (int n = 4 * lane; n < width; n += 128) cp_async16(staged + r * width + n, partials + (i64)(r0 + r) * next + n);
        cp_async_commit();
    };
    fetch(0);
    for (int w = warp; w < heads; w += warps) {
        const float* of_head = partials + w * (depth + 4) + depth;
        float* own = room + w * (MOST_RANGES + 2);
        float best = LOWEST, extra = LOWEST, total = 0;
        for (int r = lane; r < used; r += 32) {
            const float4 about = load_four(of_head + r * next);
            own[r] = about.x, best = fmaxf(best, about.x), total = r == lane ? about.y : total;
        }
        if (held) {
            float z = 0;
            for (int i = lane; i < depth; i += 32) z += q[w * stride + i] * held[1 + i];
            extra = warp_sum(z) + log2f(held[0]);
        }
        best = fmaxf(warp_max(best), extra);
        for (int r = lane; r < used; r += 32) {
            own[r] = exp2f(own[r] - best);
            total = own[r] * (r == lane ? total : load_shared_by_all(of_head + r * next + 1)) + (r == lane ? 0 : total);
        }
        const float dropped = held ? exp2f(extra - best) : 0;
        total = warp_sum(lane < used ? total : 0) + dropped;
        if (lane == 0) own[MOST_RANGES] = dropped, own[MOST_RANGES + 1] = total > 0 ? 1 / total : 0;
    }
    const int shares = max(1, min((int)blockDim.x / items, 4)), share = shares > 1 ? threadIdx.x / items : 0;  // threads of one item
    const int one = shares > 1 ? threadIdx.x % items : threadIdx.x;
    float4 x[MOST_ITEMS] = {};
    for (int r0 = 0; r0 < used; r0 += together) {
        if (r0) {
            __syncthreads();
            fetch(r0);
        }
        cp_async_wait<0>();
        __syncthreads();
        const int until = min(together, used - r0);
#pragma unroll
        for (int k = 0; k < MOST_ITEMS; k++) {
            const int n = one + k * blockDim.x, h = n / pieces;
            if (n >= items || share >= shares || (shares > 1 && k)) break;
            const float* from = staged + h * (depth + 4) + n % pieces * 4;
            const float* weights = room + h * (MOST_RANGES + 2) + r0;
            for (int r = share; r < until; r += shares) {
                const float4 y = *reinterpret_cast<const float4*>(from + r * width);
                const float weight = weights[r];
                x[k].x += weight * y.x, x[k].y += weight * y.y, x[k].z += weight * y.z, x[k].w += weight * y.w;
            }
        }
    }
    float4* parts = reinterpret_cast<float4*>(room + HEADS * (MOST_RANGES + 2));
    if (shares > 1) {
        if (share < shares) parts[threadIdx.x] = x[0];
        __syncthreads();
        for (int other = 1; other < shares && threadIdx.x < items; other++) {
            const float4 z = parts[other * items + threadIdx.x];
            x[0].x += z.x, x[0].y += z.y, x[0].z += z.z, x[0].w += z.w;
        }
    }
#pragma unroll
    for (int k = 0; k < MOST_ITEMS; k++) {
        const int n = threadIdx.x + k * blockDim.x, h = n / pieces, c = n % pieces * 4;
        if (n >= items) break;
        const float* own = room + h * (MOST_RANGES + 2);
        const float inverse = own[MOST_RANGES + 1], extra = own[MOST_RANGES];
        const float* mean = held ? held + 1 + depth + c : nullptr;
        float* to = at<float>(call.out) + row * call.out_stride + (head * call.group() + first + h) * depth + c;
        const float found[4] = {x[k].x, x[k].y, x[k].z, x[k].w};
#pragma unroll
        for (int i = 0; i < 4; i++) to[i] = (found[i] + (mean ? extra * mean[i] : 0)) * inverse;
    }
}
