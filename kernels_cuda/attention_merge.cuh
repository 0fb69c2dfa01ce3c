// Partial results of ranges of pages, and the output of a query head made of them (flash decoding).
#pragma once
#include "attention_call.cuh"
#include "last_block.cuh"

#define HEADS 8          // query heads that a block takes
#define MOST_RANGES 130  // and the newest token
#define TOGETHER 8        // loads of a thread that are under way at once
#define MERGE_FLOATS (HEADS * (MOST_RANGES + 2) + 4 * 256)

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
// heads first ... first + heads of a KV head's group. room: shared memory, MERGE_FLOATS. Loads come first, as many together as can: each
// takes long.
__device__ __forceinline__ void merge_ranges(const Call& call, int place, int s, int head, int first, int heads, int row, int ranges,
                                             int used, const float* q, int stride, float* room)
{
    const int depth = (int)call.head_dim, lane = threadIdx.x % 32, pieces = depth / 4, items = heads * pieces;
    const float* held = call.dropped(s, head);
    const float* partials = partial_of(call, ranges, place, head, 0, first);
    const int next = call.group() * (depth + 4);  // floats from one range to the next
    float4* parts = reinterpret_cast<float4*>(room + HEADS * (MOST_RANGES + 2));
    const int shares = max(1, min((int)blockDim.x / items, 4)), share = threadIdx.x / items;  // threads of one item
    __syncthreads();
    for (int begin = 0; begin < items; begin += blockDim.x) {
        const int n = begin + threadIdx.x % (shares > 1 ? items : blockDim.x), h = n / pieces, c = n % pieces * 4;
        const bool works = n < items && (shares == 1 || share < shares);
        const float* from = partials + h * (depth + 4) + c;
        float4 y[TOGETHER], x = make_float4(0, 0, 0, 0);
        auto load = [&](int r0) {
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                const int r = r0 + k * shares;
                y[k] = works && r < used ? load_four(from + r * next) : make_float4(0, 0, 0, 0);
            }
        };
        const int r0 = shares > 1 ? share : 0;
        load(r0);
        if (begin == 0) {
            for (int w = threadIdx.x / 32; w < heads; w += blockDim.x / 32) {
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
            __syncthreads();
        }
        const float* own = room + min(h, heads - 1) * (MOST_RANGES + 2);
        for (int at_range = r0; at_range < used;) {
#pragma unroll
            for (int k = 0; k < TOGETHER; k++) {
                const int r = at_range + k * shares;
                const float weight = r < used ? own[r] : 0;
                x.x += weight * y[k].x, x.y += weight * y[k].y, x.z += weight * y[k].z, x.w += weight * y[k].w;
            }
            at_range += TOGETHER * shares;
            if (at_range < used) load(at_range);
        }
        if (shares > 1) {
            if (works) parts[threadIdx.x] = x;
            __syncthreads();
            for (int other = 1; other < shares && threadIdx.x < items; other++) {
                const float4 z = parts[other * items + threadIdx.x];
                x.x += z.x, x.y += z.y, x.z += z.z, x.w += z.w;
            }
        }
        if (n < items && (shares == 1 || share == 0)) {
            const float inverse = own[MOST_RANGES + 1], extra = own[MOST_RANGES];
            const float* mean = held ? held + 1 + depth + c : nullptr;
            float* to = at<float>(call.out) + row * call.out_stride + (head * call.group() + first + h) * depth + c;
            const float found[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int i = 0; i < 4; i++) to[i] = (found[i] + (mean ? extra * mean[i] : 0)) * inverse;
        }
    }
}
