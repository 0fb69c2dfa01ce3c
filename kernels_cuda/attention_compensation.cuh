// The token that stands for what a KV head has dropped (RazorAttention, arXiv 2407.15891; Call::dropped), beside tensor cores.
#pragma once
#include "page_tiles.cuh"

// One row's sums, the r-th of a thread's two, with it alone: by all lanes of a warp, the four of a row together, which add `total` up
// later. queries: halves in shared memory, times scale and log2 e.
template <int D>
__device__ __forceinline__ void begin_with_dropped(const float* held, const u8* queries, int row, int r, float (&out)[D / 8][4], float& top,
                                                   float& total)
{
    const int j = threadIdx.x % 4;
    float score = 0;
#pragma unroll 1
    for (int piece = j; piece < D / 8; piece += 4) {
        const uint4 x = *reinterpret_cast<const uint4*>(queries + value_piece<D>(row, piece));
        const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const float2 q = halves_to_floats(words[k]);
            score = fmaf(q.x, held[1 + 8 * piece + 2 * k], fmaf(q.y, held[2 + 8 * piece + 2 * k], score));
        }
    }
    top = quad_sum(score) + log2f(held[0]), total = j == 0;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) out[n][2 * r + i] = held[1 + D + 8 * n + 2 * j + i];
}
