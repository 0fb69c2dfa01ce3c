// A block of prefill attention (attention_prefill.cu, attention_tail.cu).
#pragma once
#include "prefill_parts.cuh"

// Rows read what they see, or lists name; the first ones of blocks everything; what lists name and means of the rest.
enum Way { PLAIN, FIRSTS, TAIL };
#define LOG2_PAGE 5.0f

// What a way needs besides. Of FIRSTS: where partial results lie; of TAIL: `means`.
struct Besides {
    i64 chunks, ranges, places, means;

    __device__ __forceinline__ float* of(const Call& call, int s, int block, int head, int range) const
    {
        const i64 place = range * places + at<i64>(chunks)[s * CHUNK_FIELDS + BLOCK_PLACE] + block;
        return at<float>(call.workspace) + (place * call.num_heads + head) * (call.head_dim + 4);
    }
};

// M: of 16 rows that a warp has.
template <int D, int M, Way WAY> __device__ __forceinline__ void prefill(const Call& call, const Besides& besides)
{
    DYNAMIC_SHARED(uint4, memory);
    Tiles<D>& shared = *reinterpret_cast<Tiles<D>*>(memory);
    wait_previous();
    const int s = blockIdx.z, head = blockIdx.y, group = call.group();
    if (s >= call.sequences() || call.rows(s) == 1) return;
    const bool listed = call.prefill_lists && at<i64>(call.prefill_lists)[s];
    if (WAY == FIRSTS && !listed) return;
    constexpr int MOST = 16 * M * WARPS;  // rows
    constexpr int APART = WAY == FIRSTS ? QUERY_BLOCK : 1;  // tokens from one that has rows to the next
    int each = MOST / group;  // tokens; those of one list, where there are lists
    if (listed && WAY != FIRSTS) each = min(QUERY_BLOCK, 1 << 31 - __clz(each));
    const int rows = call.rows(s), those = (rows + APART - 1) / APART, tiles = (those + each - 1) / each;
    const int ranges = WAY == FIRSTS ? (int)besides.ranges : 1, range = blockIdx.x % ranges, tile = tiles - 1 - (int)blockIdx.x / ranges;
    if (tile < 0) return;
    const int begin = tile * each, tokens = min(each, those - begin), first_row = call.first_row(s) + APART * begin;
    const int slot = call.slots(s, head) - rows + APART * begin, high = slot + APART * (tokens - 1) + 1, low = call.first_visible(slot);
    const Reads reads = WAY == FIRSTS ? Reads(low, high) : Reads(call, s, head, first_row, low, high);
    const int* table = call.table(s, head);
    const bool tail = WAY == TAIL && listed;
    const int page_place = tail ? (int)at<i64>(besides.chunks)[s * CHUNK_FIELDS + PAGE_PLACE] : 0;
    const LeftOut left(call, reads, table, besides.means, page_place, head, tail ? slot / PAGE : 0);
    const int named = reads.parts(), parts = named + (tail ? left.count : 0);  // TAIL: behind what is read, mean pages
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;

    for (int n = threadIdx.x; n < MOST * D; n += blockDim.x) {
        const int r = n / D, c = n % D, token = first_row + APART * min(r / group, tokens - 1);
        const float* x = at<float>(call.q) + token * call.q_stride + (head * group + r % group) * D;
        const float y = r < tokens * group ? rotated(call, x, at<i64>(call.positions)[token], c) * call.scale() * LOG2E : 0;
        reinterpret_cast<u16*>(shared.queries + value_piece<D>(r, c / 8))[c % 8] = float_to_half(y);
    }

    for (int r = threadIdx.x; r < MOST; r += THREADS) shared.rows[r] = slot + APART * (r / group);

    float out[M][D / 8][4] = {}, top[M][2], total[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = LOWEST;
    if (const float* held = range ? nullptr : call.dropped(s, head)) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2 * M; i++) {
            const int m = i / 2, r = i % 2;
            begin_with_dropped<D>(held, shared.queries, 16 * M * warp + 8 * i + g, r, out[m], top[m][r], total[m][r]);
        }
    }
    const int all = (parts + 1) / 2, size = (all + ranges - 1) / ranges, first = range * size, steps = min(all, first + size);
    Part next[2];
    auto of_means = [&](int part) { return WAY == TAIL && part >= named && part < parts; };
    auto look = [&](int step) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            if (of_means(2 * step + half)) left.look(next[half], 2 * step + half - named);
            else next[half].look(reads, table, 2 * step + half);
    };
    auto load_keys = [&](int step) {
#pragma unroll
        for (int half = 0; half < 2 && step < steps; half++) {
            int* slots = shared.slots[step % 2] + 32 * half;
            if (of_means(2 * step + half)) mean_keys<D>(next[half], left.place(2 * step + half - named), shared.keys[half], slots);
            else part_keys<D>(call, next[half], 2 * step + half < reads.page_count, half, shared.keys[half], slots);
        }
        cp_async_commit();
    };
    auto load_values = [&](int step) {
#pragma unroll
        for (int half = 0; half < 2 && step < steps; half++)
            if (of_means(2 * step + half)) mean_values<D>(next[half], left.place(2 * step + half - named), shared.values[half]);
            else part_values<D>(call, next[half], 2 * step + half < reads.page_count, half, high, shared.values[half]);
        cp_async_commit();
    };
    look(first), load_keys(first), load_values(first);
    look(first + 1);
    for (int step = first; step < steps; step++) {
        cp_async_wait<1>();
        __syncthreads();
        const int* slots = shared.slots[step % 2];
        float score[M][KEYS / 8][4] = {};
#pragma unroll 4
        for (int k = 0; k < D / 16; k++) {
            u32 q[M][4];
#pragma unroll
            for (int m = 0; m < M; m++)
                load_matrices(q[m], shared.queries + value_piece<D>(16 * M * warp + 16 * m + lane % 16, 2 * k + lane / 16));
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, shared.keys[n / 4] + key_piece<D>(16 * k + lane % 16, n % 4 + lane / 16));
#pragma unroll
                for (int m = 0; m < M; m++) mma_f16(score[m][n], q[m], b[0], b[1]), mma_f16(score[m][n + 1], q[m], b[2], b[3]);
            }
        }
        bool edge = 2 * step + 1 >= reads.page_count;  // single tokens, or none
        edge = edge || slots[31] >= slot || slots[63] >= slot || slots[0] < call.first_visible(high - 1);
        if (WAY == TAIL && 2 * step + 1 >= named) {  // a page counts as 32 tokens
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int m = 0; m < M && of_means(2 * step + n / 4); m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) score[m][n][i] += LOG2_PAGE;
        }
        if (edge) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int mine = shared.rows[16 * M * warp + 16 * m + 8 * r + g], from = call.first_visible(mine);
#pragma unroll
                    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                        for (int i = 2 * r; i < 2 * r + 2; i++) {
                            const int column = slots[8 * n + 2 * j + i % 2];
                            if (column > mine || column < from) score[m][n][i] = -infinity();
                        }
                }
        }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float best = top[m][r];
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++) best = fmaxf(best, fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
                best = quad_max(best);
                if (__any_sync(FULL_WARP, best > top[m][r])) {
                    const float factor = exp2_fast(top[m][r] - best);
                    total[m][r] *= factor, top[m][r] = best;
#pragma unroll
                    for (int n = 0; n < D / 8; n++) out[m][n][2 * r] *= factor, out[m][n][2 * r + 1] *= factor;
                }
#pragma unroll
                for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                    for (int i = 2 * r; i < 2 * r + 2; i++)
                        score[m][n][i] = exp2_fast(score[m][n][i] - best), total[m][r] += score[m][n][i];
            }
        u32 weights[M][KEYS / 16][4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    weights[m][k][i] = floats_to_halves(score[m][2 * k + i / 2][2 * (i % 2)], score[m][2 * k + i / 2][2 * (i % 2) + 1]);
        cp_async_wait<0>();
        __syncthreads();
        load_keys(step + 1);
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++)
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, shared.values[k / 2] + value_piece<D>(16 * (k % 2) + lane % 16, n + lane / 16));
#pragma unroll
                for (int m = 0; m < M; m++)
                    mma_f16(out[m][n], weights[m][k], b[0], b[1]), mma_f16(out[m][n + 1], weights[m][k], b[2], b[3]);
            }
        __syncthreads();
        load_values(step + 1);
        look(step + 2);
    }
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        const int m = i / 2, r = i % 2, row = 16 * M * warp + 8 * i + g;
        const float sum = quad_sum(total[m][r]), inverse = 1 / sum;
        if (row >= tokens * group) continue;
        if (WAY == FIRSTS) {
            float* partial = besides.of(call, s, begin + row / group, head * group + row % group, range);
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<float2*>(partial + 8 * n + 2 * j) = make_float2(out[m][n][2 * r], out[m][n][2 * r + 1]);
            if (j == 0) partial[D] = top[m][r], partial[D + 1] = sum;
            continue;
        }
        float* to = at<float>(call.out) + (first_row + row / group) * call.out_stride + (head * group + row % group) * D + 2 * j;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *reinterpret_cast<float2*>(to + 8 * n) = make_float2(out[m][n][2 * r] * inverse, out[m][n][2 * r + 1] * inverse);
    }
}
