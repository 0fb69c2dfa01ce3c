// Blocks that wait for each other: a gang is `size` neighbours of a row of the grid (Launch.gang), all of them on the device at once.
#pragma once
#include "cluster.cuh"

#define MOST_GANGS (1 << 16)

__device__ u32 gathered[MOST_GANGS];  // of each gang: how many of its blocks are at a barrier; the top bit changes when all are

__device__ __forceinline__ u32 load_acquire(const u32* p)
{
    u32 x;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

__device__ __forceinline__ u32 add_release(u32* p, u32 x)  // a fence of all of this GPU, which costs less than __threadfence()
{
    u32 before;
    asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(x) : "memory");
    return before;
}

// All threads of all blocks of a gang; what they wrote to device memory before is then visible to the others (load_shared_by_all). The
// blocks are a cluster where the launch made them one, whose barrier needs no memory. gang: the same for no two gangs of a launch.
__device__ __forceinline__ void gang_barrier(int gang, int size)
{
    if (cluster_blocks() > 1) {
        cluster_arrive();
        return cluster_wait();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        const u32 own = blockIdx.x % size ? 1 : 0x80000000u - (size - 1);  // together 2^31: the count is 0 again, and the top bit another
        const u32 before = add_release(&gathered[gang], own);  // for the whole block: what it wrote comes before the barrier
        while (!((before ^ load_acquire(&gathered[gang])) & 0x80000000u)) {}
    }
    __syncthreads();
}
