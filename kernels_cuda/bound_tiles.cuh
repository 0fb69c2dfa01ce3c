// The most that a page's keys could score, by the range of each channel (select_pages.cu, `bound`), of sixteen pages at once on tensor
// cores: a page's minima and steps are a row of halves as they are, the queries' weights two halves each, which together hold 22 bits.
#pragma once
#include "decode_block.cuh"

#define TILE_PAGES 16

// What minima and steps are multiplied with, all times one power of two, which changes no order.
template <int D> struct Weights {
    uint4 of[2][D / 16][32];  // [the larger part, the rest][32 minima or steps][lane 4 g + j]: of query head g, from 8 j on

    // By all threads, once q and norms are in shared memory. A barrier is to follow.
    template <int WARPS> __device__ __forceinline__ void make(const Shared<D, WARPS>& shared, int group, float reach)
    {
        float top = shared.norms[0];
        for (int h = 1; h < group; h++) top = fmaxf(top, shared.norms[h]);
        const float factor = __uint_as_float(264 - (__float_as_uint(top) >> 23) << 23);  // the largest to 2^10 or a little more
        for (int n = threadIdx.x; n < D / 16 * 32; n += 32 * WARPS) {
            const int chunk = n / 32, g = n % 32 / 4, j = n % 4;
            const float* q = shared.q[min(g, group - 1)] + (32 * chunk + 8 * j) % D;
            u32 high[4], rest[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float2 x = make_float2(q[2 * i] * factor, q[2 * i + 1] * factor);
                if (chunk >= D / 32) x.x = 0.5f * fmaf(fabsf(x.x), reach, x.x), x.y = 0.5f * fmaf(fabsf(x.y), reach, x.y);
                high[i] = floats_to_halves(x.x, x.y);
                const float2 y = halves_to_floats(high[i]);
                rest[i] = floats_to_halves(x.x - y.x, x.y - y.y);
            }
            of[0][chunk][n % 32] = make_uint4(high[0], high[1], high[2], high[3]);
            of[1][chunk][n % 32] = make_uint4(rest[0], rest[1], rest[2], rest[3]);
        }
    }
};

// The parameters of the pages first ... first + 15 of a warp, in shared memory: lane 4 g + j sends for a fourth of those of the pages g and
// g + 8, and multiplies them. In every other page neighbouring 64 bytes change places, so that no two lanes meet in a bank.
template <int D> struct Tile {
    uint4 x[TILE_PAGES][D / 16][4];

    static __device__ __forceinline__ int entry_of(const int* table, int page, int end) { return page < end ? table[page] : -1; }

    // Sends for them, zeros for a page of halves, which has none.
    __device__ __forceinline__ void fetch(const i64* pools, const int* table, int first, int end)
    {
        const int g = threadIdx.x % 32 / 4, j = threadIdx.x % 4;
#pragma unroll
        for (int n = g; n < g + 16; n += 8) {
            const int entry = entry_of(table, first + n, end);
            const i64 from = entry < 0 ? 0 : Page(pools, entry).place(K_PARAMS);
#pragma unroll
            for (int i = 0; i < D / 16; i++) cp_async16_stream_or_zeros(&x[n][i ^ g & 1][j], at<u8>(from) + 16 * j + 64 * i, from != 0);
        }
    }
    // On their way to the second-level cache.
    static __device__ __forceinline__ void prefetch(const i64* pools, const int* table, int first, int end)
    {
        const int entry = entry_of(table, first + threadIdx.x % 32 / 2, end);
        for (int offset = 128 * (threadIdx.x % 2); entry >= 0 && offset < 4 * D; offset += 256)
            prefetch_l2(at<u8>(Page(pools, entry).place(K_PARAMS)) + offset);
    }
    // Tells the best query head's scores, -infinity where there is no page.
    __device__ __forceinline__ void score(const Weights<D>& weights, const i64* pools, const int* table, u64* scores, u32 turn, int first,
                                          int end) const
    {
        const int lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
        float sums[2][2][2][4] = {};  // of minima and of steps, by both parts of weights, twice: products that do not wait for each other
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const uint4 own = x[g][i ^ g & 1][j], other = x[g + 8][i ^ g & 1][j];
#pragma unroll
            for (int part = 0; part < 2; part++) {
                const uint4 w = weights.of[part][i][lane];
                float (&sum)[2][4] = sums[i / (D / 32)][part];
                mma_f16(sum[0], {own.x, other.x, own.y, other.y}, w.x, w.y);
                mma_f16(sum[1], {own.z, other.z, own.w, other.w}, w.z, w.w);
            }
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int page = first + g + 8 * n, entry = entry_of(table, page, end);
            const float levels = entry < 0 ? 0 : (float)Page(pools, entry).pool[K_LEVELS];  // of codes
            float both[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const auto sum = [&](int of) {
                    return sums[of][0][0][2 * n + e] + sums[of][0][1][2 * n + e] + (sums[of][1][0][2 * n + e] + sums[of][1][1][2 * n + e]);
                };
                both[e] = fmaf(levels, sum(1), sum(0));
            }
            const float best = quad_max(fmaxf(both[0], both[1]));
            if (j == 0 && page < end) tell(scores + page, entry < 0 ? -infinity() : best, turn);
        }
    }
};
