// What root-mean-square normalisation multiplies a group with, before its gain.
#pragma once

// total: the sum of squares of `width` values
__device__ __forceinline__ float factor_of(float total, int width, float epsilon)
{
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(total, (float)width) + epsilon));
}
