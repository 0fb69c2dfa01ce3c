// Prefill attention on tensor cores: a block is up to 128 rows of queries (tokens x heads of a KV head's group, so that keys and values
// are shared) against what they see, 64 cached tokens at a time, the next keys fetched while values are read and the other way round
// (after FlashAttention-2, arXiv 2307.08691). Pages of codes are expanded to halves on the way.
//   grid   (tiles of rows, kv_heads, sequences), the last rows first: they see the most
//   block  128 threads: a warp has 32 rows, as what it reads of shared memory then serves twice as many; 16 (short_prefill) where there
//          would be too few blocks for all processors
// And what is made good of what lists leave out (Delta Attention, arXiv 2505.11254; the reference is prefill_corrections.delta):
//   first_rows  of every block of queries of a sequence with lists the first one against everything, in ranges of what is seen: partial
//               results [ranges][query blocks of all sequences][num_heads][D + 4], weighted values, log2 of the reference, sum of weights
//   grid        (tiles of 64 rows * ranges, kv_heads, sequences), block 128
//   add_shifts  what that changes is added to all queries of the block. Grid (query blocks, num_heads, sequences), block D
#include "attention_compensation.cuh"
#include "attention_reads.cuh"

#define ROWS 128
#define KEYS 64
#define WARPS 4
#define THREADS (32 * WARPS)
#define TOGETHER 4  // loads of single keys that are under way
#define HIDDEN (1 << 30)

template <int D> struct Tiles {
    u8 queries[ROWS * D * 2], keys[2][D * 64], values[2][D * 64];
    int rows[ROWS];       // slot of each row's token
    int slots[2][KEYS];   // what stands in each column, of this step and the next; HIDDEN: nothing that may be seen
};

// By all threads; `half`: which half of a step's keys the part is, so that other threads expand the other half.
template <int D> __device__ __forceinline__ void part_keys(const Call& call, const Part& part, bool whole, int half, u8* keys, int* slots)
{
    const int t = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp == 0) slots[t] = part.entry < 0 ? HIDDEN : whole ? part.slot + t : part.slot;
    if (whole && part.entry < 0) return;
    const Page page(call.pools, max(part.entry, 0));
    const bool halves = page.kind(K_KIND) == F16;
    const i64 k = page.place(K);
    if (whole && halves) {
#pragma unroll
        for (int i = 0; i < 4 * D / THREADS; i++) {
            const int n = THREADS * i + threadIdx.x;
            cp_async16(keys + key_piece<D>(n / 4, n % 4), at<u8>(k + 16 * n));
        }
    } else if (whole) {
        const int unit = threadIdx.x - half * D / 2;
        if (unit >= 0 && unit < D / 2) expand_unit<D>(page, unit, keys, nullptr);
    } else if (halves) {
        const i64 from = k + 2 * (part.slot % PAGE);
#pragma unroll 1
        for (int first = warp; first < D; first += TOGETHER * WARPS) {
            u16 x[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) x[i] = part.entry < 0 ? 0 : at<u16>(from)[(first + WARPS * i) * PAGE];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) reinterpret_cast<u16*>(keys + key_piece<D>(first + WARPS * i, t / 8))[t % 8] = x[i];
        }
    } else {
#pragma unroll 1
        for (int c = warp; c < D; c += WARPS) {
            const u16 x = part.entry < 0 ? 0 : float_to_half(key_at(page, D, c, part.slot % PAGE));
            reinterpret_cast<u16*>(keys + key_piece<D>(c, t / 8))[t % 8] = x;
        }
    }
}

// The same of values, zeros from slot `high` on (never written, they may be no numbers).
template <int D> __device__ __forceinline__ void part_values(const Call& call, const Part& part, bool whole, int half, int high, u8* values)
{
    const int t = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool there = part.entry >= 0;
    const Page page(call.pools, max(part.entry, 0));
    const i64 v = page.place(V);
    if (page.kind(V_KIND) == F16 || whole && !there) {
#pragma unroll
        for (int i = 0; i < 4 * D / THREADS; i++) {
            const int n = THREADS * i + threadIdx.x;
            const int token = whole ? n / (D / 8) : t, piece = whole ? n % (D / 8) : WARPS * i + warp;
            const int from = whole ? token : part.slot % PAGE;
            cp_async16_or_zeros(values + value_piece<D>(token, piece), at<u8>(v + 2 * D * from + 16 * piece),
                                there && (!whole || part.slot + token < high));
        }
    } else if (whole) {
        const int unit = threadIdx.x - half * D / 2;
        if (unit >= 0 && unit < D / 2) expand_unit<D>(page, D / 2 + unit, nullptr, values);
    } else {
#pragma unroll 1
        for (int c = warp; c < D; c += WARPS) {
            const u16 x = there ? float_to_half(value_at(page, D, part.slot % PAGE, c)) : 0;
            reinterpret_cast<u16*>(values + value_piece<D>(t, c / 8))[c % 8] = x;
        }
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

// M: of 16 rows that a warp has. FIRSTS: rows are the first ones of the blocks that lists are for, and read everything.
template <int D, int M, bool FIRSTS> __device__ __forceinline__ void prefill(const Call& call, const Firsts& firsts)
{
    DYNAMIC_SHARED(uint4, memory);
    Tiles<D>& shared = *reinterpret_cast<Tiles<D>*>(memory);
    wait_previous();
    const int s = blockIdx.z, head = blockIdx.y, group = call.group();
    if (s >= call.sequences() || call.rows(s) == 1) return;
    const bool listed = call.prefill_lists && at<i64>(call.prefill_lists)[s];
    if (FIRSTS && !listed) return;
    constexpr int MOST = 16 * M * WARPS;  // rows
    constexpr int APART = FIRSTS ? QUERY_BLOCK : 1;  // tokens from one that has rows to the next
    int each = MOST / group;  // tokens; those of one list, where there are lists
    if (listed && !FIRSTS) each = min(QUERY_BLOCK, 1 << 31 - __clz(each));
    const int rows = call.rows(s), those = (rows + APART - 1) / APART, tiles = (those + each - 1) / each;
    const int ranges = FIRSTS ? (int)firsts.ranges : 1, range = blockIdx.x % ranges, tile = tiles - 1 - (int)blockIdx.x / ranges;
    if (tile < 0) return;
    const int begin = tile * each, tokens = min(each, those - begin), first_row = call.first_row(s) + APART * begin;
    const int slot = call.slots(s, head) - rows + APART * begin, high = slot + APART * (tokens - 1) + 1, low = call.first_visible(slot);
    const Reads reads = FIRSTS ? Reads(low, high) : Reads(call, s, head, first_row, low, high);
    const int* table = call.table(s, head);
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
    const int all = (reads.parts() + 1) / 2, size = (all + ranges - 1) / ranges, first = range * size, steps = min(all, first + size);
    Part next[2];
    auto look = [&](int step) {
#pragma unroll
        for (int half = 0; half < 2; half++) next[half].look(reads, table, 2 * step + half);
    };
    auto load_keys = [&](int step) {
#pragma unroll
        for (int half = 0; half < 2 && step < steps; half++)
            part_keys<D>(call, next[half], 2 * step + half < reads.page_count, half, shared.keys[half], shared.slots[step % 2] + 32 * half);
        cp_async_commit();
    };
    auto load_values = [&](int step) {
#pragma unroll
        for (int half = 0; half < 2 && step < steps; half++)
            part_values<D>(call, next[half], 2 * step + half < reads.page_count, half, high, shared.values[half]);
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
        if (FIRSTS) {
            float* partial = firsts.of(call, s, begin + row / group, head * group + row % group, range);
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

#define PREFILL(name, depth, m) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(CALL_PARAMETERS i64 unused) { prefill<depth, m, false>(MAKE_CALL, {}); }
PREFILL(prefill_64, 64, 2)
PREFILL(prefill_128, 128, 2)
PREFILL(short_prefill_64, 64, 1)
PREFILL(short_prefill_128, 128, 1)

#define FIRST_ROWS(name, depth) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(CALL_PARAMETERS i64 chunks, i64 ranges, i64 places) \
    { \
        prefill<depth, 1, true>(MAKE_CALL, {chunks, ranges, places}); \
    }
FIRST_ROWS(first_rows_64, 64)
FIRST_ROWS(first_rows_128, 128)

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
