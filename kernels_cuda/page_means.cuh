// The mean key and the mean value of a page's first tokens, a channel at a time.
#pragma once
#include "page_values.cuh"

__device__ __forceinline__ float mean_key(const Page& page, int depth, int c, int tokens)
{
    float sum = 0;
    if (page.kind(K_KIND) == F16) {
        const uint4* row = at<uint4>(page.place(K) + 2 * PAGE * c);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 x = row[i];
            const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 two = halves_to_floats(words[j]);
                sum += 8 * i + 2 * j < tokens ? two.x : 0;
                sum += 8 * i + 2 * j + 1 < tokens ? two.y : 0;
            }
        }
    } else
        for (int t = 0; t < tokens; t++) sum += key_at(page, depth, c, t);
    return sum / tokens;
}

__device__ __forceinline__ float mean_value(const Page& page, int depth, int c, int tokens)
{
    float sum = 0;
#pragma unroll 4
    for (int t = 0; t < tokens; t++) sum += value_at(page, depth, t, c);
    return sum / tokens;
}
