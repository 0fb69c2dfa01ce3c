// Shared by all kernels. No CUDA header is included: NVRTC from pip has none, and a header-free kernel compiles in a tenth of a second.
// Halves are kept as their bits (u16, or two of them in a u32).
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef long long i64;
typedef unsigned long long u64;

#define FULL_WARP 0xffffffffu
#define KERNEL extern "C" __global__ void
// Shared memory of a size given at launch. Behind variables of fixed size it would begin anywhere: aligned, 128 bytes that are copied
// together are one row of the banks (16 bytes off cost dense attention a sixth of its speed on an H200).
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// ---- between kernels --------------------------------------------------------------------------------------------
// A kernel launched with `overlap` may start while the one before it still runs (from sm_90 on; elsewhere both are empty). EVERY
// thread calls wait_previous() before it reads or writes what another kernel of the step touches, and before it returns: a grid that
// ends without waiting would let the next one pass the one before. Weights and `state` do not change within a step: they may be
// read sooner. release_next() lets the next kernel's blocks start as soon as there is room; what it may read is still only complete
// when this grid has ended.
__device__ __forceinline__ void wait_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void release_next()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- numbers ----------------------------------------------------------------------------------------------------
__device__ __forceinline__ float half_to_float(u16 bits)
{
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
}

__device__ __forceinline__ u16 float_to_half(float f)
{
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
    return bits;
}

__device__ __forceinline__ float2 halves_to_floats(u32 two) { return make_float2(half_to_float(two & 0xffff), half_to_float(two >> 16)); }

// low in the low half
__device__ __forceinline__ u32 floats_to_halves(float low, float high)
{
    u32 two;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
    return two;
}

// a * b + c of two halves each
__device__ __forceinline__ u32 fma_halves(u32 a, u32 b, u32 c)
{
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// c plus the four products of bytes; of the first operand signed or unsigned ones
__device__ __forceinline__ i32 dot_signed(u32 a, u32 b, i32 c) { return __dp4a((int)a, (int)b, c); }

__device__ __forceinline__ i32 dot_unsigned(u32 a, u32 b, i32 c)
{
    i32 d;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// (a & b) | c in one instruction: a nibble or a byte into the mantissa of a half
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c)
{
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x)
{
#pragma unroll
    for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

// ---- memory -----------------------------------------------------------------------------------------------------
// 16 bytes that are read once: they pass the first-level cache by
__device__ __forceinline__ uint4 load_stream(const void* p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ uint2 load_stream8(const void* p)
{
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// `bytes`, a multiple of 16 from an address that is one, on their way to the second-level cache by one instruction; before sm_90 nothing
__device__ __forceinline__ void prefetch_l2_bulk(const void* p, u32 bytes)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void cp_async16(void* shared, const void* global)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// zeros instead when `valid` is false; the address must be one that may be read all the same
__device__ __forceinline__ void cp_async16_or_zeros(void* shared, const void* global, bool valid)
{
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

// 4, 8 or 16 bytes, which pass the first-level cache by if they are 16
template <int bytes> __device__ __forceinline__ void cp_async_or_zeros(void* shared, const void* global, bool valid)
{
    const int size = valid ? bytes : 0;
    if (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(size) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(bytes),
                     "r"(size) : "memory");
}

// 16 bytes of what is read from memory, once and in order: the second-level cache asks for 256 bytes at a time
__device__ __forceinline__ void cp_async16_stream_or_zeros(void* shared, const void* global, bool valid)
{
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// until at most `left` of this thread's groups are under way
template <int left> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory"); }

// ---- matrices ---------------------------------------------------------------------------------------------------
// Four 8 x 8 matrices of 16-bit values (8 rows of 16 bytes): lane 8 * i + r gives the address of row r of matrix i.
__device__ __forceinline__ void load_matrices(u32 (&m)[4], const void* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&m)[4], const void* row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(shared_address(row)) : "memory");
}

// c += a b with int8 a [16, 32] and b [32, 8]. Lane l, g = l / 4, t = l % 4: a[0], a[1] are rows g, g + 8 of columns 4t .. 4t + 3, a[2],
// a[3] the same of columns 16 + 4t ..; b[0], b[1] are column g of rows 4t .., 16 + 4t ..; c[0 .. 3] are (g, 2t), (g, 2t + 1), (g + 8,
// 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_s8(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c += a b with half a [16, 16] and b [16, 8], float c: as above with pairs of halves in place of four bytes (columns 2t, 2t + 1; 8 + 2t
// ..).
__device__ __forceinline__ void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
