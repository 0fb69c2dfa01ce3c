// Single keys and values of pages of any format (page_formats.py): for what is not worth a faster way.
#pragma once
#include "page_pool.cuh"

// The code in row r and column i of `rows` rows.
__device__ __forceinline__ int code_at(int kind, const u8* codes, int rows, int r, int i)
{
    const int quad = r / 4, half = i / 16, byte = 4 * (i % 16) + r % 4;
    if (kind == INT4) return codes[64 * quad + byte] >> 4 * half & 15;
    if (kind == INT8) return (codes[64 * quad + byte] >> 4 * half & 15) << 4 | (codes[16 * rows + 64 * quad + byte] >> 4 * half & 15);
    const int low = codes[64 * (quad / 2) + byte] >> (4 * (quad % 2) + 2 * half) & 3;
    return kind == INT2 ? low : low | (codes[8 * rows + 64 * (quad / 4) + byte] >> (2 * (quad % 4) + half) & 1) << 2;
}

__device__ __forceinline__ float key_at(const Page& page, int depth, int c, int t)
{
    const i64 from = page.place(K);
    const int kind = page.kind(K_KIND);
    if (kind == F32) return at<float>(from)[c * PAGE + t];
    if (kind == F16) return half_to_float(at<u16>(from)[c * PAGE + t]);
    if (kind == DELTA) {  // what was last written, of a block of `gate` channels
        const int gate = page.kind(K_GAP), own = c / gate;
        const u32* written = at<u32>(from) + 1;
        int before = 0;
        for (int b = 0; b < own; b++) before += gate * __popc(written[b]);
        const int rank = __popc(written[own] & ((2u << t) - 1)) - 1;
        const i64 head = (4 + 4 * depth / gate + 63) / 64 * 64;
        return half_to_float(at<u16>(from + head)[before + c % gate * __popc(written[own]) + rank]);
    }
    const u16* params = at<u16>(page.place(K_PARAMS));
    const bool by_row = page.kind(K_AXIS) == BY_ROW;
    const int low = by_row ? c : (page.kind(GROUPS) == 1 ? 0 : c / 32 * 64) + t, step = low + (by_row ? depth : 32);
    return fmaf((float)code_at(kind, at<u8>(from), depth, c, t), half_to_float(params[step]), half_to_float(params[low]));
}

// add(t, x) of each token's key in a page of the pools, one channel of it.
template <typename Add> __device__ __forceinline__ void each_token(const Page& page, int depth, int c, const Add& add)
{
    if (page.kind(K_KIND) == F16) {
        const uint4* row = at<uint4>(page.place(K) + 2 * PAGE * c);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 x = row[i];
            const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float2 two = halves_to_floats(words[j]);
                add(8 * i + 2 * j, two.x), add(8 * i + 2 * j + 1, two.y);
            }
        }
    } else
        for (int t = 0; t < PAGE; t++) add(t, key_at(page, depth, c, t));
}

__device__ __forceinline__ float value_at(const Page& page, int depth, int t, int c)
{
    const i64 from = page.place(V);
    const int kind = page.kind(V_KIND), width = (depth + 31) / 32 * 32;
    if (kind == F32) return at<float>(from)[t * width + c];
    if (kind == F16) return half_to_float(at<u16>(from)[t * width + c]);
    const u16* params = at<u16>(page.place(V_PARAMS));
    const int groups = page.kind(GROUPS), low = (groups == 1 ? 0 : c / 32 * 64) + t;
    const float x = fmaf((float)code_at(kind, at<u8>(from + c / 32 * page.pool[V_BLOCK]), 32, t, c % 32), half_to_float(params[low + 32]),
                         half_to_float(params[low]));
    return page.kind(SEPARATED) ? x * half_to_float(params[64 * groups + c]) : x;
}
