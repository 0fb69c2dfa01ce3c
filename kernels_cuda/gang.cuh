// Blocks that wait for each other: a gang is `size` neighbours of a row of the grid (Launch.gang), all of them on the device at once.
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ >= 900
#define CLUSTERS  // blocks that the hardware starts together and that reach each other's shared memory
#endif

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
#if __CUDA_ARCH__ >= 900
    u32 blocks;
    asm volatile("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(blocks));
    if (blocks > 1) {
        asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
        return;
    }
#endif
    __syncthreads();
    if (threadIdx.x == 0) {
        const u32 own = blockIdx.x % size ? 1 : 0x80000000u - (size - 1);  // together 2^31: the count is 0 again, and the top bit another
        const u32 before = add_release(&gathered[gang], own);  // for the whole block: what it wrote comes before the barrier
        while (!((before ^ load_acquire(&gathered[gang])) & 0x80000000u)) {}
    }
    __syncthreads();
}

// ---- of a cluster alone; nothing where there are none. Threads that have ended count as arrived. ---------------------------------------
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
