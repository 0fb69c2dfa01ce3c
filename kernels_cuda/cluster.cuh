// Blocks that the hardware starts together and that reach each other's shared memory, from sm_90 on, where a launch makes neighbours a
// cluster (Launch.cluster). Elsewhere each block is alone, and waiting and storing do nothing.
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ >= 900
#define CLUSTERS
#endif

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

// Threads that have ended count as arrived.
__device__ __forceinline__ void cluster_arrive_first()  // nothing was written before: that a block has begun is all there is to tell
{
#ifdef CLUSTERS
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive()  // what was written before, to shared memory of any block too, is there after all waited
{
#ifdef CLUSTERS
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait()
{
#ifdef CLUSTERS
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// To the place in block `rank` of the cluster that `own` is in this one. Once all have begun: a barrier before.
__device__ __forceinline__ void store_to_block(float4* own, int rank, float4 x)
{
#ifdef CLUSTERS
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
#endif
}

__device__ __forceinline__ void store_to_block(float2* own, int rank, float2 x)
{
#ifdef CLUSTERS
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(rank));
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(x.x), "f"(x.y) : "memory");
#endif
}

// `count` times 16 bytes of this block's shared memory to the same place in that of the others, a power of two with it, by all threads.
__device__ __forceinline__ void copy_to_peers(void* from, int count, int blocks)
{
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        float4* own = (float4*)from + i;
        const float4 x = *own;
        for (int peer = 1; peer < blocks; peer++) store_to_block(own, cluster_rank() ^ peer, x);
    }
}
