// The range of a page's keys, channel by channel, for pages that do not know it.
#pragma once
#include "page_values.cuh"

__device__ __noinline__ float key_of(const Page& page, int depth, int c, int t) { return key_at(page, depth, c, t); }

// The row of an index: half_below(smallest), half_above(how far the largest lies above it), channel by channel.
__device__ __forceinline__ void make_row(const Page& page, int depth, u16* row, int lane)
{
    for (int c = lane; c < depth; c += 32) {
        float low = infinity(), high = -infinity();
        for (int t = 0; t < PAGE; t++) {
            const float x = key_of(page, depth, c, t);
            low = fminf(low, x), high = fmaxf(high, x);
        }
        u16 bottom, step;
        asm("cvt.rm.f16.f32 %0, %1;" : "=h"(bottom) : "f"(low));
        asm("cvt.rp.f16.f32 %0, %1;" : "=h"(step) : "f"(high - half_to_float(bottom)));
        row[c] = bottom, row[depth + c] = step;
    }
}
