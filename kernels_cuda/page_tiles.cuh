// Pages as halves in shared memory, for products with many rows of queries: keys [channel][32 tokens], values [32 tokens][channel], pieces
// of 16 bytes exchanged so that ldmatrix meets no bank twice.
#pragma once
#include "page_values.cuh"

template <int D> __device__ __forceinline__ int key_piece(int channel, int piece) { return channel * 64 + (piece ^ channel / 2 % 4) * 16; }
template <int D> __device__ __forceinline__ int value_piece(int token, int piece) { return token * 2 * D + (piece ^ token % 8) * 16; }

// Codes of four rows (a quad) and the columns 8 x ... 8 x + 7, and 16 further: byte j of low[i] and high[i] is row j.
__device__ __forceinline__ void quad_codes(int kind, i64 from, int rows, int quad, int x, u32 (&low)[8], u32 (&high)[8])
{
    const int half = 32 * x;
    const int plane = kind == INT4 || kind == INT8 ? 64 * quad : 64 * (quad / 2);
    const uint4 a = *at<uint4>(from + plane + half), b = *at<uint4>(from + plane + half + 16);
    const u32 words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    if (kind == INT4) {
#pragma unroll
        for (int i = 0; i < 8; i++) low[i] = words[i] & 0x0F0F0F0Fu, high[i] = words[i] >> 4 & 0x0F0F0F0Fu;
    } else if (kind == INT8) {
        const uint4 c = *at<uint4>(from + 16 * rows + plane + half), d = *at<uint4>(from + 16 * rows + plane + half + 16);
        const u32 others[8] = {c.x, c.y, c.z, c.w, d.x, d.y, d.z, d.w};
#pragma unroll
        for (int i = 0; i < 8; i++) {
            low[i] = (words[i] & 0x0F0F0F0Fu) << 4 | (others[i] & 0x0F0F0F0Fu);
            high[i] = (words[i] & 0xF0F0F0F0u) | (others[i] >> 4 & 0x0F0F0F0Fu);
        }
    } else {
        const int shift = 4 * (quad % 2);
#pragma unroll
        for (int i = 0; i < 8; i++) low[i] = words[i] >> shift & 0x03030303u, high[i] = words[i] >> (shift + 2) & 0x03030303u;
        if (kind == INT3) {
            const i64 top = from + 8 * rows + 64 * (quad / 4) + half;
            const uint4 c = *at<uint4>(top), d = *at<uint4>(top + 16);
            const u32 others[8] = {c.x, c.y, c.z, c.w, d.x, d.y, d.z, d.w};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                low[i] |= (others[i] >> 2 * (quad % 4) & 0x01010101u) << 2;
                high[i] |= (others[i] >> (2 * (quad % 4) + 1) & 0x01010101u) << 2;
            }
        }
    }
}

// Eight neighbouring columns of row j of a quad as values.
__device__ __forceinline__ uint4 row_values(const u32 (&words)[8], int j, u32 low, u32 step)
{
    u32 x[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 bytes = __byte_perm(words[2 * i], words[2 * i + 1], j | (j + 4) << 8);  // to bytes 0 and 2; 0x6400 are the bits of 1024
        x[i] = fma_halves(sub_halves(and_or(bytes, 0x00FF00FFu, 0x64006400u), 0x64006400u), step, low);
    }
    return make_uint4(x[0], x[1], x[2], x[3]);
}

// One of D parts of a quantised page, each for a thread: half a quad of rows of K (unit < D / 2), or of a block of V.
template <int D> __device__ __forceinline__ void expand_unit(const Page& page, int unit, u8* keys, u8* values)
{
    const bool of_keys = unit < D / 2;
    if (!of_keys) unit -= D / 2;
    const int x = unit % 2, quad = of_keys ? unit / 2 : unit / 2 % 8, block = of_keys ? 0 : unit / 16;
    const int kind = page.kind(of_keys ? K_KIND : V_KIND);
    const i64 params = of_keys ? page.place(K_PARAMS) + 8 * quad : page.place(V_PARAMS) + 128 * block + 8 * quad;
    const uint2 lows = *at<uint2>(params), steps = *at<uint2>(params + (of_keys ? 2 * D : 64));
    u32 low[8], high[8];
    quad_codes(kind, of_keys ? page.place(K) : page.place(V) + block * 128 * kind, of_keys ? D : 32, quad, x, low, high);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const u32 minimum = __byte_perm(j < 2 ? lows.x : lows.y, 0, j % 2 ? 0x3232 : 0x1010);
        const u32 step = __byte_perm(j < 2 ? steps.x : steps.y, 0, j % 2 ? 0x3232 : 0x1010);
        u8* first = of_keys ? keys + key_piece<D>(4 * quad + j, x) : values + value_piece<D>(4 * quad + j, 4 * block + x);
        u8* second = of_keys ? keys + key_piece<D>(4 * quad + j, x + 2) : values + value_piece<D>(4 * quad + j, 4 * block + x + 2);
        *reinterpret_cast<uint4*>(first) = row_values(low, j, minimum, step);
        *reinterpret_cast<uint4*>(second) = row_values(high, j, minimum, step);
    }
}

// Of a page of any of these types the keys alone. By all threads, of which there are D / 2 at least.
template <int D> __device__ __forceinline__ void fetch_keys(const Page& page, u8* keys)
{
    if (page.kind(K_KIND) == F16) {
        const i64 k = page.place(K);
        for (int n = threadIdx.x; n < D * 4; n += blockDim.x) cp_async16(keys + key_piece<D>(n / 4, n % 4), at<u8>(k + 16 * n));
    } else if (threadIdx.x < D / 2)
        expand_unit<D>(page, threadIdx.x, keys, nullptr);
}
