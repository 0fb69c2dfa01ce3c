// Prefill attention on tensor cores: a block is up to 128 rows of queries (tokens x heads of a KV head's group, so that keys and values
// are shared) against what they see, 64 cached tokens at a time, in two stages of shared memory (after FlashAttention-2, arXiv
// 2307.08691). Pages of codes are expanded to halves on the way.
//   grid   (tiles of rows, kv_heads, sequences), the last rows first: they see the most
//   block  256 threads: a warp has 16 rows
// And what is made good of what lists leave out (Delta Attention, arXiv 2505.11254; the reference is prefill_corrections.delta):
//   first_rows  of every block of queries of a sequence with lists the first one against everything, in ranges of what is seen: partial
//               results [ranges][query blocks of all sequences][num_heads][D + 4], weighted values, log2 of the reference, sum of weights
//   grid        (tiles of rows * ranges, kv_heads, sequences), block 256
//   add_shifts  what that changes is added to all queries of the block. Grid (query blocks, num_heads, sequences), block D
#include "attention_reads.cuh"
#include "page_tiles.cuh"

#define ROWS 128
#define KEYS 64
#define HIDDEN (1 << 30)

template <int D> struct Stage {
    u8 keys[2][D * 64], values[2][D * 64];
};
template <int D> struct Tiles {
    union { Stage<D> stages[2]; u8 queries[ROWS * D * 2]; };
    int slots[2][KEYS];   // what stands in each column; HIDDEN: nothing that may be seen
};

// Part `part` of what is read, 32 slots, to shared memory.
template <int D>
__device__ __forceinline__ void fetch(const Call& call, const Reads& reads, const int* table, int part, int high, u8* keys, u8* values,
                                      int* slots)
{
    if (part >= reads.parts()) {
        if (threadIdx.x < 32) slots[threadIdx.x] = HIDDEN;
        for (int n = threadIdx.x; n < D * 4; n += blockDim.x) reinterpret_cast<uint4*>(values)[n] = make_uint4(0, 0, 0, 0);
        return;
    }
    if (part < reads.page_count) {
        const int start = reads.slot(part, 0), entry = table[start / PAGE];
        if (threadIdx.x < 32) slots[threadIdx.x] = entry < 0 ? HIDDEN : start + threadIdx.x;
        if (entry < 0) {
            for (int n = threadIdx.x; n < D * 4; n += blockDim.x) reinterpret_cast<uint4*>(values)[n] = make_uint4(0, 0, 0, 0);
            return;
        }
        const Page page(call.pools, entry);
        if (page.kind(K_KIND) == F16) copy_page<D>(page, high - start, keys, values);
        else if (threadIdx.x < D) expand_unit<D>(page, threadIdx.x, keys, values);
        return;
    }
    for (int n = threadIdx.x; n < 32 * D; n += blockDim.x) {  // single tokens, wherever they are
        const int t = n % 32, c = n / 32, slot = reads.slot(part, t), entry = slot < 0 ? -1 : table[slot / PAGE];
        if (c == 0) slots[t] = entry < 0 ? HIDDEN : slot;
        const u16 key = entry < 0 ? 0 : float_to_half(key_at(Page(call.pools, entry), D, c, slot % PAGE));
        const u16 value = entry < 0 ? 0 : float_to_half(value_at(Page(call.pools, entry), D, slot % PAGE, c));
        reinterpret_cast<u16*>(keys + key_piece<D>(c, t / 8))[t % 8] = key;
        reinterpret_cast<u16*>(values + value_piece<D>(t, c / 8))[c % 8] = value;
    }
}

// Where partial results of first_rows lie.
struct Firsts {
    i64 chunks, ranges, places;

    __device__ __forceinline__ float* of(const Call& call, int s, int block, int head, int range) const
    {
        const i64 place = range * places + at<i64>(chunks)[s * CHUNK_FIELDS + BLOCK_PLACE] + block;
        return at<float>(call.workspace) + (place * call.num_heads + head) * (call.head_dim + 4);
    }
};

// FIRSTS: rows are the first ones of the blocks that lists are for, and read everything.
template <int D, bool FIRSTS> __device__ __forceinline__ void prefill(const Call& call, const Firsts& firsts)
{
    DYNAMIC_SHARED(uint4, memory);
    Tiles<D>& shared = *reinterpret_cast<Tiles<D>*>(memory);
    wait_previous();
    const int s = blockIdx.z, head = blockIdx.y, group = call.group();
    if (s >= call.sequences() || call.rows(s) == 1) return;
    const bool listed = call.prefill_lists && at<i64>(call.prefill_lists)[s];
    if (FIRSTS && !listed) return;
    constexpr int APART = FIRSTS ? QUERY_BLOCK : 1;  // tokens from one that has rows to the next
    int each = ROWS / group;  // tokens; those of one list, where there are lists
    if (listed && !FIRSTS) each = min(QUERY_BLOCK, 1 << 31 - __clz(each));
    const int rows = call.rows(s), those = (rows + APART - 1) / APART, tiles = (those + each - 1) / each;
    const int ranges = FIRSTS ? (int)firsts.ranges : 1, range = blockIdx.x % ranges, tile = tiles - 1 - (int)blockIdx.x / ranges;
    if (tile < 0) return;
    const int begin = tile * each, tokens = min(each, those - begin), first_row = call.first_row(s) + APART * begin;
    const int slot = call.slots(s, head) - rows + APART * begin, high = slot + APART * (tokens - 1) + 1, low = call.first_visible(slot);
    const Reads reads = FIRSTS ? Reads(low, high) : Reads(call, s, head, first_row, low, high);
    const int* table = call.table(s, head);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;

    for (int n = threadIdx.x; n < ROWS * D; n += blockDim.x) {
        const int r = n / D, c = n % D, token = first_row + APART * min(r / group, tokens - 1);
        const float* x = at<float>(call.q) + token * call.q_stride + (head * group + r % group) * D;
        const float y = r < tokens * group ? rotated(call, x, at<i64>(call.positions)[token], c) * call.scale() * LOG2E : 0;
        reinterpret_cast<u16*>(shared.queries + value_piece<D>(r, c / 8))[c % 8] = float_to_half(y);
    }
    __syncthreads();
    u32 q[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; k++) load_matrices(q[k], shared.queries + value_piece<D>(16 * warp + lane % 16, 2 * k + lane / 16));
    __syncthreads();

    float out[D / 8][4] = {}, top[2] = {LOWEST, LOWEST}, total[2] = {};
    const int mine[2] = {slot + APART * ((16 * warp + g) / group), slot + APART * ((16 * warp + g + 8) / group)};
    const int from[2] = {call.first_visible(mine[0]), call.first_visible(mine[1])};
    const int all = (reads.parts() + 1) / 2, size = (all + ranges - 1) / ranges, first = range * size, steps = min(all, first + size);
    auto load = [&](int step) {
        Stage<D>& stage = shared.stages[step % 2];
#pragma unroll 1
        for (int part = 0; part < 2; part++)
            fetch<D>(call, reads, table, 2 * step + part, high, stage.keys[part], stage.values[part], shared.slots[step % 2] + 32 * part);
        cp_async_commit();
    };
    if (first < steps) load(first);
    for (int step = first; step < steps; step++) {
        if (step + 1 < steps) load(step + 1);
        else cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const Stage<D>& stage = shared.stages[step % 2];
        const int* slots = shared.slots[step % 2];
        float score[KEYS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++)
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, stage.keys[n / 4] + key_piece<D>(16 * k + lane % 16, n % 4 + lane / 16));
                mma_f16(score[n], q[k], b[0], b[1]);
                mma_f16(score[n + 1], q[k], b[2], b[3]);
            }
        bool edge = 2 * step + 1 >= reads.page_count;  // single tokens, or none
        edge = edge || slots[31] >= slot || slots[63] >= slot || slots[0] < call.first_visible(high - 1);
        if (edge) {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int column = slots[8 * n + 2 * j + i % 2];
                    if (column > mine[i / 2] || column < from[i / 2]) score[n][i] = -infinity();
                }
        }
        float best[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) best[i / 2] = fmaxf(best[i / 2], score[n][i]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            best[r] = quad_max(best[r]);
            if (__any_sync(FULL_WARP, best[r] > top[r])) {
                const float factor = exp2_fast(top[r] - best[r]);
                total[r] *= factor, top[r] = best[r];
#pragma unroll
                for (int n = 0; n < D / 8; n++) out[n][2 * r] *= factor, out[n][2 * r + 1] *= factor;
            }
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) score[n][i] = exp2_fast(score[n][i] - top[i / 2]), total[i / 2] += score[n][i];
#pragma unroll
        for (int k = 0; k < KEYS / 16; k++) {
            const u32 weights[4] = {floats_to_halves(score[2 * k][0], score[2 * k][1]), floats_to_halves(score[2 * k][2], score[2 * k][3]),
                                    floats_to_halves(score[2 * k + 1][0], score[2 * k + 1][1]),
                                    floats_to_halves(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
            for (int n = 0; n < D / 8; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, stage.values[k / 2] + value_piece<D>(16 * (k % 2) + lane % 16, n + lane / 16));
                mma_f16(out[n], weights, b[0], b[1]);
                mma_f16(out[n + 1], weights, b[2], b[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float sum = quad_sum(total[r]), inverse = 1 / sum;
        const int row = 16 * warp + g + 8 * r;
        if (row >= tokens * group) continue;
        if (FIRSTS) {
            float* partial = firsts.of(call, s, begin + row / group, head * group + row % group, range);
#pragma unroll
            for (int n = 0; n < D / 8; n++)
                *reinterpret_cast<float2*>(partial + 8 * n + 2 * j) = make_float2(out[n][2 * r], out[n][2 * r + 1]);
            if (j == 0) partial[D] = top[r], partial[D + 1] = sum;
            continue;
        }
        float* to = at<float>(call.out) + (first_row + row / group) * call.out_stride + (head * group + row % group) * D + 2 * j;
#pragma unroll
        for (int n = 0; n < D / 8; n++)
            *reinterpret_cast<float2*>(to + 8 * n) = make_float2(out[n][2 * r] * inverse, out[n][2 * r + 1] * inverse);
    }
}

extern "C" __global__ void __launch_bounds__(256) prefill_64(CALL_PARAMETERS i64 unused) { prefill<64, false>(MAKE_CALL, {}); }
extern "C" __global__ void __launch_bounds__(256) prefill_128(CALL_PARAMETERS i64 unused) { prefill<128, false>(MAKE_CALL, {}); }
extern "C" __global__ void __launch_bounds__(256) first_rows_64(CALL_PARAMETERS i64 chunks, i64 ranges, i64 places)
{
    prefill<64, true>(MAKE_CALL, {chunks, ranges, places});
}
extern "C" __global__ void __launch_bounds__(256) first_rows_128(CALL_PARAMETERS i64 chunks, i64 ranges, i64 places)
{
    prefill<128, true>(MAKE_CALL, {chunks, ranges, places});
}

KERNEL add_shifts(CALL_PARAMETERS i64 chunks, i64 ranges, i64 places)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Firsts firsts = {chunks, ranges, places};
    const int s = blockIdx.z, head = blockIdx.y, begin = blockIdx.x * QUERY_BLOCK, c = threadIdx.x, depth = (int)call.head_dim;
    if (s >= call.sequences() || call.prefill_lists == 0 || at<i64>(call.prefill_lists)[s] == 0 || begin >= call.rows(s)) return;
    float top = LOWEST, sum = 0, x = 0;
    for (int range = 0; range < ranges; range++) {
        const float* partial = firsts.of(call, s, blockIdx.x, head, range);
        const float best = fmaxf(top, partial[depth]), before = exp2f(top - best), now = exp2f(partial[depth] - best);
        x = x * before + partial[c] * now, sum = sum * before + partial[depth + 1] * now, top = best;
    }
    float* to = at<float>(call.out) + (call.first_row(s) + begin) * call.out_stride + head * depth + c;
    const float change = x / sum - *to;
    for (int r = 0; r < min(QUERY_BLOCK, call.rows(s) - begin); r++) to[r * call.out_stride] += change;
}
