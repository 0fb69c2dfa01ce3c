// Keys and values of pages of any format, four neighbouring rows of a column at a time: a word of codes holds as many.
#pragma once
#include "page_values.cuh"

// Codes of the rows 4 quad ... 4 quad + 3 in column i. coarse: of codes in two planes the first alone, and the mean of the other.
__device__ __forceinline__ float4 codes_of_quad(int kind, i64 codes, int rows, int quad, int i, bool coarse)
{
    const int word = 4 * (i % 16), half = i / 16;
    u32 x = *at<u32>(codes + 64 * (kind >= INT4 ? quad : quad / 2) + word);
    if (kind >= INT4) {
        x = x >> 4 * half & 0x0F0F0F0Fu;
        if (kind == INT8) x <<= 4;
        if (kind == INT8 && !coarse) x |= *at<u32>(codes + 16 * rows + 64 * quad + word) >> 4 * half & 0x0F0F0F0Fu;
    } else {
        x = x >> (4 * (quad % 2) + 2 * half) & 0x03030303u;
        if (kind == INT3) x |= (*at<u32>(codes + 8 * rows + 64 * (quad / 4) + word) >> (2 * (quad % 4) + half) & 0x01010101u) << 2;
    }
    const float rest = kind == INT8 && coarse ? 7.5f : 0;
    return make_float4((x & 255) + rest, (x >> 8 & 255) + rest, (x >> 16 & 255) + rest, (x >> 24) + rest);
}

// x * step + low, of each row its own or of all the same; addresses of halves.
__device__ __forceinline__ float4 scaled(float4 x, i64 lows, i64 steps, bool by_row)
{
    if (!by_row) {
        const float low = half_to_float(*at<u16>(lows)), step = half_to_float(*at<u16>(steps));
        return make_float4(fmaf(x.x, step, low), fmaf(x.y, step, low), fmaf(x.z, step, low), fmaf(x.w, step, low));
    }
    const uint2 a = *at<uint2>(lows), b = *at<uint2>(steps);
    const float2 l0 = halves_to_floats(a.x), l1 = halves_to_floats(a.y), s0 = halves_to_floats(b.x), s1 = halves_to_floats(b.y);
    return make_float4(fmaf(x.x, s0.x, l0.x), fmaf(x.y, s0.y, l0.y), fmaf(x.z, s1.x, l1.x), fmaf(x.w, s1.y, l1.y));
}

// Channels 4 quad ... 4 quad + 3 of the key of token t.
__device__ __forceinline__ float4 keys_of_quad(const Page& page, int depth, int quad, int t, bool coarse)
{
    const int kind = page.kind(K_KIND), c = 4 * quad;
    const i64 from = page.place(K);
    if (kind == F16) {
        const u16* x = at<u16>(from) + c * PAGE + t;
        return make_float4(half_to_float(x[0]), half_to_float(x[PAGE]), half_to_float(x[2 * PAGE]), half_to_float(x[3 * PAGE]));
    }
    if (kind > INT8)
        return make_float4(key_at(page, depth, c, t), key_at(page, depth, c + 1, t), key_at(page, depth, c + 2, t),
                           key_at(page, depth, c + 3, t));
    const bool by_row = page.kind(K_AXIS) == BY_ROW;
    const i64 lows = page.place(K_PARAMS) + 2 * (by_row ? c : (page.kind(GROUPS) == 1 ? 0 : c / 32 * 64) + t);
    return scaled(codes_of_quad(kind, from, depth, quad, t, coarse), lows, lows + 2 * (by_row ? depth : 32), by_row);
}

// Channel c of the values of tokens 4 quad ... 4 quad + 3.
__device__ __forceinline__ float4 values_of_quad(const Page& page, int depth, int quad, int c)
{
    const int kind = page.kind(V_KIND), t = 4 * quad;
    if (kind > INT8)
        return make_float4(value_at(page, depth, t, c), value_at(page, depth, t + 1, c), value_at(page, depth, t + 2, c),
                           value_at(page, depth, t + 3, c));
    const i64 params = page.place(V_PARAMS), lows = params + 2 * ((page.kind(GROUPS) == 1 ? 0 : c / 32 * 64) + t);
    const i64 from = page.place(V) + c / 32 * page.pool[V_BLOCK];
    const float4 x = scaled(codes_of_quad(kind, from, 32, quad, c % 32, false), lows, lows + 64, true);
    if (!page.kind(SEPARATED)) return x;
    const float own = half_to_float(at<u16>(params)[64 * page.kind(GROUPS) + c]);
    return make_float4(x.x * own, x.y * own, x.z * own, x.w * own);
}
