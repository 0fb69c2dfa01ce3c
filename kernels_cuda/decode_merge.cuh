// From what a decode block's warps have summed up to the output: within a block, then over the blocks of a KV head.
#pragma once
#include "decode_block.cuh"

// What a warp has of some pages, of the query heads g: weighted values and what minima add to them (attention_decode.cuh), the reference of
// weights and their sum.
template <int D> struct Sums {
    float sum[D / 16][4] = {}, base[2] = {}, top = LOWEST, total = 0;
    Queries weights;

    // Scores of a page -> the weights of its values.
    template <int WARPS>
    __device__ __forceinline__ const Queries& weigh(const Shared<D, WARPS>& shared, const float* scores, int start, bool there, int g,
                                                    int j)
    {
        float p[8];
        const float4 a = *reinterpret_cast<const float4*>(scores + g * SCORE_STRIDE + 8 * j);
        const float4 b = *reinterpret_cast<const float4*>(scores + g * SCORE_STRIDE + 8 * j + 4);
        p[0] = a.x, p[1] = a.y, p[2] = a.z, p[3] = a.w, p[4] = b.x, p[5] = b.y, p[6] = b.z, p[7] = b.w;
        if (start < shared.low || start + PAGE > shared.slots || !there) {  // few pages have hidden slots
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int slot = start + 8 * j + i;
                if (slot < shared.low || slot >= shared.slots || !there) p[i] = -infinity();
            }
        }
        float best = p[0];
#pragma unroll
        for (int i = 1; i < 8; i++) best = fmaxf(best, p[i]);
        const float norm = shared.norms[g];
        best = quad_max(best) * norm;
        const bool moves = best > top + SLACK;
        if (__any_sync(FULL_WARP, moves)) {
            const float factor = moves ? exp2_fast(top - best) : 1;
            total *= factor, top = moves ? best : top;
            const float even = __shfl_sync(FULL_WARP, factor, 8 * j), odd = __shfl_sync(FULL_WARP, factor, 8 * j + 4);
#pragma unroll
            for (int i = 0; i < D / 16; i++) sum[i][0] *= even, sum[i][1] *= odd, sum[i][2] *= even, sum[i][3] *= odd;
            base[0] *= even, base[1] *= odd;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) p[i] = exp2_fast(fmaf(p[i], norm, -top)), total += p[i];
        weights[0][0] = floats_to_halves(p[0], p[2]), weights[0][1] = floats_to_halves(p[1], p[3]);
        weights[1][0] = floats_to_halves(p[4], p[6]), weights[1][1] = floats_to_halves(p[5], p[7]);
        return weights;
    }
};

// Sums of the warps, and with `newest` the newest token -> the range's partial result, told to the gang or left to its last block; of the
// only range the output.
template <int KIND, int D, int WARPS>
__device__ __forceinline__ void finish(const Call& call, Shared<D, WARPS>& shared, const Sums<D>& sums, bool newest)
{
    constexpr int ROW = D + 4;  // no two lanes of a store meet in a bank
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4, group = call.group();
    float* out = reinterpret_cast<float*>(&shared + 1);  // [WARPS][HEADS][ROW]
    const float total = quad_sum(sums.total);
    __syncthreads();  // the rings give way to sums
    if (j == 0) shared.tops[warp][g] = sums.top, shared.sums[warp][g] = total;
#pragma unroll
    for (int e = 0; e < 2; e++) {
        float* of_head = out + (warp * HEADS + 2 * j + e) * ROW;
        if (KIND == F16) {
#pragma unroll
            for (int tile = 0; tile < D / 16; tile += 2)
                *reinterpret_cast<float4*>(of_head + 64 * (tile / 4) + 8 * g + 2 * (tile % 4)) =
                    make_float4(sums.sum[tile][e], sums.sum[tile][e + 2], sums.sum[tile + 1][e], sums.sum[tile + 1][e + 2]);
        } else {
#pragma unroll
            for (int tile = 0; tile < D / 16; tile += 2)
#pragma unroll
                for (int i = e; i < 4; i += 2)
                    *reinterpret_cast<float2*>(of_head + 16 * tile + 2 * g + 8 * (i - e)) =
                        make_float2(sums.sum[tile][i] * (1 / unit_of<KIND>(i)), sums.sum[tile + 1][i] * (1 / unit_of<KIND>(i)));
        }
    }
    if (g < D / 32) shared.base[warp][2 * j][g] = sums.base[0], shared.base[warp][2 * j + 1][g] = sums.base[1];
    __syncthreads();
    const int pieces = group * D / 4;
    for (int n = threadIdx.x; n < pieces; n += 32 * WARPS) {
        const int h = n / (D / 4), c = n % (D / 4) * 4;
        float best = newest ? shared.newest[h] : LOWEST, all = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) best = fmaxf(best, shared.tops[w][h]);
        float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = exp2_fast(shared.tops[w][h] - best), base = shared.base[w][h][c / 32];
            const float4 y = *reinterpret_cast<const float4*>(out + (w * HEADS + h) * ROW + c);
            x.x += factor * (y.x + base), x.y += factor * (y.y + base), x.z += factor * (y.z + base), x.w += factor * (y.w + base);
            all += factor * shared.sums[w][h];
        }
        if (newest) {
            const float factor = exp2_fast(shared.newest[h] - best);
            const float* value = shared.value + c;
            x.x += factor * value[0], x.y += factor * value[1], x.z += factor * value[2], x.w += factor * value[3], all += factor;
        }
        if (shared.alone) {
            const float inverse = 1 / all;
            float* to = at<float>(call.out) + shared.row * call.out_stride + (shared.head * group + h) * D + c;
            to[0] = x.x * inverse, to[1] = x.y * inverse, to[2] = x.z * inverse, to[3] = x.w * inverse;
        } else if (shared.told) {
            u64* to = shared.told + shared.range * TOLD + h * (D + 2);
            tell_two(to + c, x.x, x.y, shared.turn), tell_two(to + c + 2, x.z, x.w, shared.turn);
            if (c == 0) tell_two(to + D, best, all, shared.turn);
        } else {
            float* partial = partial_of(call, gridDim.x, blockIdx.z, shared.head, shared.range, h);
            *reinterpret_cast<float4*>(partial + c) = x;
            if (c == 0) partial[D] = best, partial[D + 1] = all;
        }
    }
}

template <class F> __device__ __forceinline__ float over_lanes(float x, int width, F f)  // of `width` neighbours
{
    for (int step = width / 2; step; step >>= 1) x = f(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

// The output's channels that are this block's share, of the partial results of all blocks of a gang. A lane takes a range of a piece, so
// that all loads are under way together, and sums are of the same order whoever comes first. Then the turn is over.
template <int D, int WARPS> __device__ __forceinline__ void merge_share(const Call& call, const Shared<D, WARPS>& shared)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = call.group(), blocks = shared.used + 1;
    const int width = blocks > 16 ? 32 : blocks > 8 ? 16 : 8, together = 32 / width;
    const int pieces = group * D / 4, share = (pieces + blocks - 1) / blocks, first = shared.range * share;
    const int end = min(pieces, first + share);
    const float* held = call.dropped(blockIdx.z, shared.head);
    const u32 turn = shared.turn;
    const auto sum = [&](float x) { return over_lanes(x, width, [](float a, float b) { return a + b; }); };
    for (int from = first + warp * together; from < end; from += WARPS * together) {
        const int own = from + lane / width, n = min(own, end - 1), h = n / (D / 4), c = n % (D / 4) * 4;
        float top = LOWEST, total = 0;
        float4 x = make_float4(0, 0, 0, 0);
        for (int r = lane % width; r < blocks; r += width) {
            const u64* told = shared.told + r * TOLD + h * (D + 2);
            u64 a[2], b[2], about[2];
            for (int tries = 0;; tries++) {
                hear_two(a, told + c), hear_two(b, told + c + 2), hear_two(about, told + D);
                const bool there = turn_of(a[0]) == turn && turn_of(a[1]) == turn && turn_of(b[0]) == turn && turn_of(b[1]) == turn;
                if (there && turn_of(about[0]) == turn && turn_of(about[1]) == turn) break;
                // others may be reading all that the memory gives: who waits long asks for little, and less and less often
                for (u32 ns = 0; tries >= 3 && turn_of(about[0]) != turn; ns = min(ns + 20, 2000u)) {
                    pause(ns);
                    hear_two(about, told + D);
                }
            }
            const float best = fmaxf(top, told_by(about[0])), old = exp2_fast(top - best), factor = exp2_fast(told_by(about[0]) - best);
            x.x = old * x.x + factor * told_by(a[0]), x.y = old * x.y + factor * told_by(a[1]);
            x.z = old * x.z + factor * told_by(b[0]), x.w = old * x.w + factor * told_by(b[1]);
            total = old * total + factor * told_by(about[1]), top = best;
        }
        float extra = LOWEST;
        if (held) {
            float z = 0;
            for (int i = lane % width; i < D; i += width) z += shared.q[h][i] * held[1 + i];
            extra = sum(z) + log2f(held[0]);
        }
        const float best = fmaxf(over_lanes(top, width, [](float a, float b) { return fmaxf(a, b); }), extra);
        const float factor = exp2_fast(top - best), dropped = held ? exp2_fast(extra - best) : 0;
        total = sum(factor * total) + dropped;
        x.x = sum(factor * x.x), x.y = sum(factor * x.y), x.z = sum(factor * x.z), x.w = sum(factor * x.w);
        if (lane % width == 0 && own < end) {
            const float inverse = total > 0 ? 1 / total : 0;
            const float* mean = held + 1 + D + c;
            float* to = at<float>(call.out) + shared.row * call.out_stride + (shared.head * group + h) * D + c;
            const float found[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int i = 0; i < 4; i++) to[i] = (found[i] + (held ? dropped * mean[i] : 0)) * inverse;
        }
    }
    if (shared.range) return;
    __syncthreads();  // the first block has a share: by now it has heard from all
    if (threadIdx.x == 0) *shared.turn_at = turn;
}
