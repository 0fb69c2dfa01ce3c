// Blocks that share their shared memory, from sm_90 on, where a launch makes neighbours a cluster (Launch.cluster). Elsewhere each block is
// alone.
#pragma once
#include "common.cuh"

__device__ __forceinline__ int cluster_blocks()
{
    u32 blocks = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
#endif
    return (int)blocks;
}

__device__ __forceinline__ int cluster_rank()
{
    u32 rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(rank));
#endif
    return (int)rank;
}

// Instead of arrive_at_cluster(), without its fence, where only that a block has begun is to be known.
__device__ __forceinline__ void begin_in_cluster()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

// All threads of a cluster, one after the other: what was written before the first is visible after the second.
__device__ __forceinline__ void arrive_at_cluster()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_cluster()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// `count` times 16 bytes of this block's shared memory to the same place in that of the others, a power of two with it, by all threads.
__device__ __forceinline__ void copy_to_peers(const void* from, int count, int blocks)
{
#if __CUDA_ARCH__ >= 900
    const u32 own = shared_address(from), rank = cluster_rank();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const uint4 x = ((const uint4*)from)[i];
        for (int peer = 1; peer < blocks; peer++) {
            u32 to;
            asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(own + 16 * i), "r"(rank ^ peer));
            asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
        }
    }
#endif
}
