// The PTX instructions that kernels_cuda uses, as functions of their operands; the names are theirs, with _ for what a name cannot hold.
#pragma once
#include <chrono>
#include "cuda.h"

namespace ptx {
typedef unsigned u32;
typedef uint16_t u16;
typedef unsigned long long u64;

inline void* from_shared(u32 address) { return emulated::shared + (int)address; }

// ---- halves: as their bits -----------------------------------------------------------------------------------------
inline float value(u16 bits) { return (float)emulated_bits<_Float16>(bits); }
inline u16 half(float x) { return emulated_bits<u16>((_Float16)x); }
inline u16 next_half(u16 bits, bool up)  // the neighbour above or below
{
    if (!(bits & 0x7fff)) return up ? 1 : 0x8001;
    return bits + ((bits >> 15) == up ? -1 : 1);
}
template <class F> u32 pairs(u32 a, u32 b, u32 c, F f)
{
    u32 found = 0;
    for (int i = 0; i < 32; i += 16) found |= (u32)half(f(value(a >> i), value(b >> i), value(c >> i))) << i;
    return found;
}
inline void cvt_f32_f16(float& d, u16 a) { d = value(a); }
inline void cvt_rn_f16_f32(u16& d, float a) { d = half(a); }
inline void cvt_rm_f16_f32(u16& d, float a) { d = half(a), d = value(d) > a ? next_half(d, false) : d; }
inline void cvt_rp_f16_f32(u16& d, float a) { d = half(a), d = value(d) < a ? next_half(d, true) : d; }
inline void cvt_rn_f16x2_f32(u32& d, float high, float low) { d = half(low) | (u32)half(high) << 16; }
inline void fma_rn_f16x2(u32& d, u32 a, u32 b, u32 c) { d = pairs(a, b, c, [](double x, double y, double z) { return float(x * y + z); }); }
inline void mul_rn_f16x2(u32& d, u32 a, u32 b) { d = pairs(a, b, 0, [](float x, float y, float) { return x * y; }); }
inline void sub_rn_f16x2(u32& d, u32 a, u32 b) { d = pairs(a, b, 0, [](float x, float y, float) { return x - y; }); }

// ---- numbers -------------------------------------------------------------------------------------------------------
inline void ex2_approx_ftz_f32(float& d, float a) { d = exp2f(a); }
inline void rcp_approx_f32(float& d, float a) { d = 1 / a; }
inline void lop3_b32(u32& d, u32 a, u32 b, u32 c, int table)
{
    d = 0;
    for (int i = 0; i < 32; i++) d |= (u32)(table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i;
}
inline void dp4a_u32_s32(int& d, u32 a, u32 b, int c)
{
    d = c;
    for (int i = 0; i < 32; i += 8) d += int((uint8_t)(a >> i)) * int((int8_t)(b >> i));
}

// ---- memory --------------------------------------------------------------------------------------------------------
inline void ld_global_nc_L1__no_allocate_v2_u32(u32& x, u32& y, const void* p)
{
    const u32* from = (const u32*)p;
    x = from[0], y = from[1];
}
inline void ld_global_nc_L1__no_allocate_v4_u32(u32& x, u32& y, u32& z, u32& w, const void* p)
{
    const u32* from = (const u32*)p;
    x = from[0], y = from[1], z = from[2], w = from[3];
}
inline void ld_global_cg_f32(float& x, const void* p) { x = *(const float*)p; }
inline void ld_global_cg_v4_f32(float& x, float& y, float& z, float& w, const void* p)
{
    const float* from = (const float*)p;
    x = from[0], y = from[1], z = from[2], w = from[3];
}
// What waits for another block asks again and again; the block's other threads, whose words that may wait for, go on meanwhile.
inline void waits()
{
    if (std::chrono::steady_clock::now() - emulated::began > std::chrono::minutes(5)) emulated::fail("a block waits for one that does not come");
    static thread_local unsigned asked;
    if (++asked % 256) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(50));  // who asks must not keep a core from who answers
    if (emulated::following(emulated::now) != emulated::now) emulated::yield();
}
inline void ld_relaxed_gpu_global_u32(u32& x, const u32* p) { x = __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void ld_relaxed_gpu_global_u64(u64& x, const u64* p)
{
    waits();
    x = __atomic_load_n(p, __ATOMIC_ACQUIRE);
}
inline void ld_relaxed_gpu_global_v2_u64(u64& x, u64& y, const u64* p)
{
    if ((uintptr_t)p % 16) emulated::fail("two words that are not aligned");
    waits();
    x = __atomic_load_n(p, __ATOMIC_ACQUIRE), y = __atomic_load_n(p + 1, __ATOMIC_ACQUIRE);
}
inline void nanosleep_u32(u32) {}
inline void st_relaxed_gpu_global_u64(u64* p, u64 x) { __atomic_store_n(p, x, __ATOMIC_RELEASE); }
inline void st_relaxed_gpu_global_v2_u64(u64* p, u64 x, u64 y)
{
    if ((uintptr_t)p % 16) emulated::fail("two words that are not aligned");
    __atomic_store_n(p, x, __ATOMIC_RELEASE), __atomic_store_n(p + 1, y, __ATOMIC_RELEASE);
}

inline void prefetch_global_L2(const void*) {}

// Copies arrive when the thread waits for their group, not before, so that a wait that is missing shows.
inline void cp_async_cg_shared_global(u32 to, const void* from, int bytes, int size)
{
    if (((uintptr_t)from | to) % bytes) emulated::fail("an asynchronous copy that is not aligned");
    emulated::threads[emulated::now].copies.back().push_back({from_shared(to), from, bytes, size});
}
inline void cp_async_cg_shared_global_L2__256B(u32 to, const void* from, int bytes, int size)
{
    cp_async_cg_shared_global(to, from, bytes, size);
}
inline void cp_async_cg_shared_global(u32 to, const void* from, int bytes) { cp_async_cg_shared_global(to, from, bytes, bytes); }
inline void cp_async_ca_shared_global(u32 to, const void* from, int bytes, int size) { cp_async_cg_shared_global(to, from, bytes, size); }
inline void cp_async_commit_group() { emulated::threads[emulated::now].copies.emplace_back(); }
inline void cp_async_wait_group(int left) { emulated::finish_copies(left); }

inline void bar_sync(int barrier, int threads) { emulated::wait(emulated::named_barriers[barrier], threads); }

// ---- matrices: a warp's lanes hold parts of them -------------------------------------------------------------------
inline void load_matrices(u32& m0, u32& m1, u32& m2, u32& m3, u32 row, bool transposed)
{
    u32* const m[4] = {&m0, &m1, &m2, &m3};
    const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane, a = lane / 4, b = 2 * (lane % 4);
    if (row % 16) emulated::fail("a row of a matrix that is not aligned");
    emulated::threads[emulated::now].slot[0] = row;
    emulated::wait_warp();
    for (int i = 0; i < 4; i++) {
        auto element = [&](int r, int c) { return (u32)((const u16*)from_shared((u32)emulated::threads[first + 8 * i + r].slot[0]))[c]; };
        *m[i] = transposed ? element(b, a) | element(b + 1, a) << 16 : element(a, b) | element(a, b + 1) << 16;
    }
    emulated::wait_warp();
}
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(u32& a, u32& b, u32& c, u32& d, u32 row) { load_matrices(a, b, c, d, row, false); }
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(u32& a, u32& b, u32& c, u32& d, u32 row)
{
    load_matrices(a, b, c, d, row, true);
}

#define MATRICES(Sum) Sum &d0, Sum &d1, Sum &d2, Sum &d3, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, Sum c0, Sum c1, Sum c2, Sum c3

// d = a b + c, a [16, K] and b [K, 8] in registers of 32 bits that hold n elements each: K = 8 n
template <int n, class Sum, class A, class B>
void multiply(MATRICES(Sum), A of_a, B of_b)
{
    const unsigned lane = threadIdx.x % 32, first = threadIdx.x - lane;
    uint64_t* own = emulated::threads[emulated::now].slot;
    own[0] = a0 | (uint64_t)a1 << 32, own[1] = a2 | (uint64_t)a3 << 32, own[2] = b0 | (uint64_t)b1 << 32;
    emulated::wait_warp();
    const int bits = 32 / n;
    auto part = [&](int owner, int slot, bool upper, int k) {  // the bits of element k % n of a register of a lane
        return u32(emulated::threads[first + owner].slot[slot] >> (32 * upper + bits * (k % n)));
    };
    Sum sums[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 8 * n; k++) {
            const int quarter = k % (4 * n) / n, half_of_k = k / (4 * n);
            sums[i] += of_a(part(4 * (row % 8) + quarter, half_of_k, row >= 8, k)) * of_b(part(4 * column + quarter, 2, half_of_k, k));
        }
    }
    emulated::wait_warp();
    d0 = sums[0], d1 = sums[1], d2 = sums[2], d3 = sums[3];
}
#define GIVEN d0, d1, d2, d3, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3
inline int s8(u32 bits) { return (int8_t)bits; }
inline int u8(u32 bits) { return (uint8_t)bits; }
inline float f16(u32 bits) { return value(bits); }
inline void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(MATRICES(int)) { multiply<4>(GIVEN, s8, s8); }
inline void mma_sync_aligned_m16n8k32_row_col_s32_u8_s8_s32(MATRICES(int)) { multiply<4>(GIVEN, u8, s8); }
inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(MATRICES(float)) { multiply<2>(GIVEN, f16, f16); }
}  // namespace ptx
