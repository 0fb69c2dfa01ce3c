// Work that several blocks share: the last of them to end puts it together.
#pragma once
#include "common.cuh"

__device__ __forceinline__ float4 load_four(const float* p)
{
    float4 x;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(p));
    return x;
}

__device__ u32 arrived[1 << 16];  // blocks that are done, of each piece of work that several share

// Whether this block is the last of `expected` ones to come here; what the others wrote is then visible. The count starts anew.
__device__ __forceinline__ bool last_to_arrive(int index, int expected)
{
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // for the whole block: what it wrote comes before the barrier
        last = atomicAdd(&arrived[index], 1) == expected - 1;
        if (last) arrived[index] = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}
