// The mean key and the mean value of a page's first tokens, a channel at a time.
#pragma once
#include "page_values.cuh"

__device__ __forceinline__ float mean_key(const Page& page, int depth, int c, int tokens)
{
    float sum = 0;
    each_token(page, depth, c, [&](int t, float x) { sum += t < tokens ? x : 0; });
    return sum / tokens;
}

__device__ __forceinline__ float mean_value(const Page& page, int depth, int c, int tokens)
{
    float sum = 0;
#pragma unroll 4
    for (int t = 0; t < tokens; t++) sum += value_at(page, depth, t, c);
    return sum / tokens;
}
