// The range of a page's keys, channel by channel, for pages that do not know it.
#pragma once
#include "page_values.cuh"

__device__ __noinline__ float key_of(const Page& page, int depth, int c, int t) { return key_at(page, depth, c, t); }

// The row of an index: half_below(smallest), half_above(how far the largest lies above it), of channel c.
__device__ __forceinline__ void keep_range(u16* row, int depth, int c, float low, float high)
{
    u16 bottom, step;
    asm("cvt.rm.f16.f32 %0, %1;" : "=h"(bottom) : "f"(low));
    asm("cvt.rp.f16.f32 %0, %1;" : "=h"(step) : "f"(high - half_to_float(bottom)));
    row[c] = bottom, row[depth + c] = step;
}

// The same of keys that the cache has rotated, as they were before: by a warp, a lane has channels lane, lane + 32 and so on.
__device__ __noinline__ void make_row_before_rotation(Page page, int depth, u16* row, int lane)
{
    constexpr int MOST = 8;
    float low[MOST], high[MOST];
#pragma unroll
    for (int i = 0; i < MOST; i++) low[i] = infinity(), high[i] = -infinity();
    const int size = depth & -depth;  // of blocks that are rotated by themselves
    const float factor = rsqrtf((float)size);
#pragma unroll 1
    for (int t = 0; t < PAGE; t++) {
        float x[MOST];
#pragma unroll
        for (int i = 0; i < MOST; i++) x[i] = lane + 32 * i < depth ? key_of(page, depth, lane + 32 * i, t) : 0;
#pragma unroll 1
        for (int span = 1; span < min(size, 32); span *= 2)
#pragma unroll
            for (int i = 0; i < MOST; i++) {
                const float other = __shfl_xor_sync(FULL_WARP, x[i], span);
                x[i] = lane & span ? other - x[i] : x[i] + other;
            }
#pragma unroll
        for (int span = 1; span < MOST; span *= 2) {
            if (32 * span >= size) break;
#pragma unroll
            for (int i = 0; i < MOST; i++)
                if (!(i & span)) {
                    const float a = x[i], b = x[i + span];
                    x[i] = a + b, x[i + span] = a - b;
                }
        }
#pragma unroll
        for (int i = 0; i < MOST; i++) low[i] = fminf(low[i], x[i] * factor), high[i] = fmaxf(high[i], x[i] * factor);
    }
#pragma unroll
    for (int i = 0; i < MOST; i++)
        if (lane + 32 * i < depth) keep_range(row, depth, lane + 32 * i, low[i], high[i]);
}

// By a warp; rotated: whether the cache's keys are, of which bounds are never.
__device__ __forceinline__ void make_row(const Page& page, int depth, bool rotated, u16* row, int lane)
{
    if (rotated) return make_row_before_rotation(page, depth, row, lane);
    for (int c = lane; c < depth; c += 32) {
        float low = infinity(), high = -infinity();
        for (int t = 0; t < PAGE; t++) {
            const float x = key_of(page, depth, c, t);
            low = fminf(low, x), high = fmaxf(high, x);
        }
        keep_range(row, depth, c, low, high);
    }
}
