// One token against a range of the pages that a KV head holds: what a warp does with a page, on tensor cores, for up to 8 query heads.
// A page's rows are multiplied as codes: their steps go into q (keys by channel), or into the softmax weights (values by token).
#pragma once
#include "attention_merge.cuh"
#include "page_fragments.cuh"

#define SCORE_STRIDE 36    // floats from one head's 32 scores to the next: no two lanes meet in a bank
#define SLACK 4.0f         // log2 of what a weight may be: the reference of a head's weights moves only when a score passes it by so much
#define MIXED (-1)         // of kinds: codes of any type, each page its own

__device__ __forceinline__ uint4 piece(const u8* p) { return *reinterpret_cast<const uint4*>(p); }

typedef u32 Queries[2][2];  // of one lane and 32 rows: [step][rows 0 and 2, rows 1 and 3 of its quad]

// Scores of the 32 tokens of a page, up to what q was divided by, to shared memory [HEADS][SCORE_STRIDE].
template <int KIND, int D, bool FAR = false>
__device__ __forceinline__ void score_page(const u8* side, const uint4 (&queries)[D / 32][32], float* scores, int g, int j, int bits = KIND)
{
    float c[2][4] = {}, base[2][4] = {};
    const u8* params = side + 4 * D * bits;
#pragma unroll(FAR ? 2 : D / 32)  // as many loads at once as there are registers
    for (int block = 0; block < D / 32; block++) {
        Codes<KIND, FAR> x;
        x.load(side, 0, block, D, g, j, bits);
        const uint4 of_block = queries[block][4 * g + j];
        const Queries q = {{of_block.x, of_block.y}, {of_block.z, of_block.w}};
        Queries w;
        if (KIND != F16) {
            u32 low[2][2], step[2][2];
            paired(piece(params + 64 * block + 16 * j), low);
            paired(piece(params + 2 * D + 64 * block + 16 * j), step);
            const u32 lows[4] = {low[0][0], low[1][0], low[0][1], low[1][1]};  // rows g are the first step's, rows g + 8 the second's
#pragma unroll
            for (int u = 0; u < 2; u++) {
                mma_f16(base[u], lows, q[u][0], q[u][1]);
                w[u][0] = mul_halves(q[u][0], step[u][0]), w[u][1] = mul_halves(q[u][1], step[u][1]);
            }
        }
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const u32 w0 = KIND == F16 ? q[u][0] : w[u][0], w1 = KIND == F16 ? q[u][1] : w[u][1];
            mma_f16(c[0], x.template operand<false>(u, 0).a, w0, w1);
            mma_f16(c[1], x.template operand<false>(u, 1).a, w0, w1);
        }
    }
    float* of_head = scores + 2 * j * SCORE_STRIDE;
    if (KIND == F16) {
        *reinterpret_cast<float4*>(of_head + 4 * g) = make_float4(c[0][0], c[0][2], c[1][0], c[1][2]);
        *reinterpret_cast<float4*>(of_head + SCORE_STRIDE + 4 * g) = make_float4(c[0][1], c[0][3], c[1][1], c[1][3]);
    } else {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            constexpr float unit = 1 / TINY, further = KIND == INT4 ? unit / 16 : unit;
            const float low = base[0][h] + base[1][h + 2];
            float* to = of_head + h * SCORE_STRIDE + 2 * g;
            *reinterpret_cast<float2*>(to) = make_float2(fmaf(c[0][h], unit, low), fmaf(c[1][h], unit, low));
            *reinterpret_cast<float2*>(to + 16) = make_float2(fmaf(c[0][h + 2], further, low), fmaf(c[1][h + 2], further, low));
        }
    }
}

// What the sums of values in register `i` are times, in a cache of `KIND` (page_fragments.cuh).
template <int KIND> __device__ __forceinline__ constexpr float unit_of(int i)
{
    return KIND == F16 ? 1 : KIND == INT4 && i / 2 ? 16 * TINY : TINY;
}

// Weighted values of a page, p: the weights as `Queries` of tokens. Where a cache (CACHE) has quantised pages, sum[2 b + e] has the
// channels 32 b + 2 g + e and the one 16 further, times unit_of(); `base`, of what minima add, in row b the block b of 32 channels.
template <int KIND, int D, int CACHE>
__device__ __forceinline__ void weigh_codes(const u8* side, const Queries& p, float (&sum)[D / 16][4], float (&base)[2], int g, int j,
                                            int bits = KIND)
{
    const u8* params = side + 4 * D * bits;
    u32 low[2][2];
    float minima[4] = {base[0], base[1], 0, 0};
    paired(g < D / 32 ? piece(params + 128 * g + 16 * j) : make_uint4(0, 0, 0, 0), low);
#pragma unroll
    for (int u = 0; u < 2; u++) mma_f16(minima, {low[u][0], 0, low[u][1], 0}, p[u][0], p[u][1]);
    base[0] = minima[0], base[1] = minima[1];
#pragma unroll
    for (int b = 0; b < D / 32; b++) {
        Codes<KIND, false> x;
        x.load(side, b * 128 * bits, 0, 32, g, j, bits);
        u32 step[2][2];
        paired(piece(params + 128 * b + 64 + 16 * j), step);
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const u32 w0 = mul_halves(p[u][0], step[u][0]), w1 = mul_halves(p[u][1], step[u][1]);
            mma_f16(sum[2 * b], x.template operand<CACHE != INT4>(u, 0).a, w0, w1);
            mma_f16(sum[2 * b + 1], x.template operand<CACHE != INT4>(u, 1).a, w0, w1);
        }
    }
}

// Values in halves, straight from a page of which `written` tokens are written, in the order of channels that codes have.
template <int D, int CACHE>
__device__ __forceinline__ void weigh_far_halves(const u8* values, const Queries& p, int written, float (&sum)[D / 16][4], int g, int j)
{
#pragma unroll
    for (int b = 0; b < D / 32; b++) {
        float own[2][4] = {};
#pragma unroll(D == 64 ? 2 : 1)
        for (int u = 0; u < 2; u++) {
            const u32 w0 = u ? p[1][0] : p[0][0], w1 = u ? p[1][1] : p[0][1];
            u32 x[4], y[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int t = 8 * j + 4 * u + i;
                const u8* from = values + 2 * (t * D + 32 * b + 2 * g);
                x[i] = t < written ? *reinterpret_cast<const u32*>(from) : 0;
                y[i] = t < written ? *reinterpret_cast<const u32*>(from + 32) : 0;
            }
            mma_f16(own[0], {low_halves(x[0], x[2]), low_halves(y[0], y[2]), low_halves(x[1], x[3]), low_halves(y[1], y[3])}, w0, w1);
            mma_f16(own[1], {high_halves(x[0], x[2]), high_halves(y[0], y[2]), high_halves(x[1], x[3]), high_halves(y[1], y[3])}, w0, w1);
        }
        __syncwarp();  // the warp together: no more at once than there are registers
#pragma unroll
        for (int i = 0; i < 8; i++) sum[2 * b + i / 4][i % 4] = fmaf(own[i / 4][i % 4], unit_of<CACHE>(i % 4), sum[2 * b + i / 4][i % 4]);
    }
}

// The same for caches of halves alone, with loads of 16 bytes: sum[4 f + m] has the channels 64 f + 8 g + 2 m and the next one.
template <int D>
__device__ __forceinline__ void weigh_halves(const u8* side, const Queries& p, float (&sum)[D / 16][4], int g, int j)
{
    side += swizzled<value_shift<F16, D>()>(16 * D * j + 16 * g);
#pragma unroll
    for (int f = 0; f < D / 64; f++)
#pragma unroll
        for (int u = 0; u < 2; u++) {
            uint4 x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = piece(side + 2 * D * (4 * u + i) + 128 * f);
#pragma unroll
            for (int m = 0; m < 4; m++) {
                const u32 a = (&x[0].x)[m], b = (&x[1].x)[m], c = (&x[2].x)[m], d = (&x[3].x)[m];
                mma_f16(sum[4 * f + m], {low_halves(a, c), high_halves(a, c), low_halves(b, d), high_halves(b, d)}, p[u][0], p[u][1]);
            }
        }
}

// Bytes of a side in shared memory. Where a cache has codes, its few pages of halves are read where they are.
template <int KIND, int D> __device__ __forceinline__ constexpr int side_bytes()
{
    return KIND == F16 ? 64 * D : KIND == INT4 ? 20 * D : 36 * D;
}

// Where a side (K or V) of a page lies. In the low four bits of `codes` their number of bits, 0 of halves; all 0: no page.
struct Place { i64 codes, params; };

__device__ __forceinline__ Place place_of(const i64* pools, int entry, int side)
{
    const Page page(pools, entry);
    const int kind = page.kind(side == K ? K_KIND : V_KIND);
    const bool halves = kind >= F16;
    return {page.place(side) | (halves ? 0 : kind), halves ? 0 : page.place(side + 2)};
}
__device__ __forceinline__ bool of_halves(const i64* pools, int entry)
{
    const Page page(pools, entry);
    return page.kind(K_KIND) >= F16 && page.kind(V_KIND) >= F16;
}
__device__ __forceinline__ int bits_of(i64 codes) { return (int)codes & 15; }
__device__ __forceinline__ u8* codes_at(i64 codes) { return at<u8>(codes & -16); }

template <int KIND, int D>
__device__ __forceinline__ void score_any(i64 codes, const u8* side, const uint4 (&queries)[D / 32][32], float* scores, int g, int j)
{
    if (KIND == F16) return score_page<F16, D>(side, queries, scores, g, j);
    const int bits = bits_of(codes);
    if (bits == 0) return score_page<F16, D, true>(codes_at(codes), queries, scores, g, j);
    if (KIND == INT4 || bits == INT4) return score_page<INT4, D>(side, queries, scores, g, j);
    if (bits == INT8) return score_page<INT8, D>(side, queries, scores, g, j);
    return score_page<INT3, D>(side, queries, scores, g, j, bits);
}

template <int KIND, int D>
__device__ __forceinline__ void weigh_any(i64 codes, const u8* side, const Queries& p, int written, float (&sum)[D / 16][4],
                                           float (&base)[2], int g, int j)
{
    if (KIND == F16) return weigh_halves<D>(side, p, sum, g, j);
    const int bits = bits_of(codes);
    if (bits == 0) return weigh_far_halves<D, KIND>(codes_at(codes), p, written, sum, g, j);
    if (KIND == INT4 || bits == INT4) return weigh_codes<INT4, D, KIND>(side, p, sum, base, g, j);
    if (bits == INT8) return weigh_codes<INT8, D, KIND>(side, p, sum, base, g, j);
    return weigh_codes<INT3, D, KIND>(side, p, sum, base, g, j, bits);
}

// The channel of register `i` of sum[tile].
template <int KIND> __device__ __forceinline__ int channel_of(int tile, int i, int g)
{
    const int further = i / 2;
    return KIND == F16 ? 64 * (tile / 4) + 8 * g + 2 * (tile % 4) + further : 32 * (tile / 2) + 2 * g + tile % 2 + 16 * further;
}

// A side of a page (K or V) on its way to shared memory, codes first and parameters behind them, by all lanes. Of values in halves zeros
// from token `written` on: what was never written may be no numbers.
template <int KIND, int D> __device__ __forceinline__ void fetch_side(const Place& place, int side, int written, u8* to, int lane)
{
    const u8* from = codes_at(place.codes) + 16 * lane;
    if (KIND == F16) {
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            const int shift = side == K ? key_shift<F16, D>() : value_shift<F16, D>();
            u8* own = to + 512 * i + (16 * lane ^ (512 * i >> shift & 3) << 5);  // as swizzled() has it
            if (side == K) cp_async16(own, from + 512 * i);
            else cp_async16_or_zeros(own, from + 512 * i, (16 * lane + 512 * i) / (2 * D) < written);
        }
        return;
    }
    const int bits = bits_of(place.codes), bytes = KIND == INT4 ? 16 * D : 4 * D * bits;
    if (bits == 0) {  // those are read where they are
        for (int i = lane; i < D / 2; i += 32) prefetch_l2(codes_at(place.codes) + 128 * i);
        return;
    }
    if (16 * lane < 4 * D) cp_async16(to + bytes + 16 * lane, at<u8>(place.params) + 16 * lane);
    u8* own = to + swizzled<7>(16 * lane);  // which 512 bytes further is 512 bytes further
#pragma unroll
    for (int i = 0; i < (KIND == INT4 ? D / 32 : D / 16); i++)
        if (KIND == INT4 || 16 * lane + 512 * i < bytes) cp_async16(own + 512 * i, from + 512 * i);
}
