// Halves in pairs, and what attention and selection share beyond common.cuh.
#pragma once
#include "common.cuh"

#define LOG2E 1.4426950408889634f
#define LOWEST -3e38f  // finite, so that the difference of two is no NaN

template <class T> __device__ __forceinline__ T* at(i64 address) { return reinterpret_cast<T*>(address); }

__device__ __forceinline__ u32 mul_halves(u32 a, u32 b)
{
    u32 x;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}

__device__ __forceinline__ u32 sub_halves(u32 a, u32 b)
{
    u32 x;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
}

__device__ __forceinline__ u32 low_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ u32 high_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// of the lanes 4 g ... 4 g + 3
__device__ __forceinline__ float quad_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(FULL_WARP, x, 2));
}

__device__ __forceinline__ float quad_sum(float x)
{
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}
