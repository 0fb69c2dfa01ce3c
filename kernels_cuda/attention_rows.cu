// Attention in float32 over pages of any format, for what tensor cores do not take: float32 pages, deltas, parameters by token, separated
// channels, head sizes other than 64 and 128. And new tokens into their pages, where decode does not write them itself.
// attend_rows: a block is one row of queries, up to 8 heads of a KV head's group and a range of what they read; a lane is a cached token.
//   grid   (kv_heads * parts * ranges, rows)   parts: of 8 heads;  block 128 threads
// write_tokens: grid (kv_heads, rows)
// which: 1 rows of sequences that have one, 2 of those that have more, 3 all
#include "attention_merge.cuh"
#include "attention_reads.cuh"
#include "page_values.cuh"

#define MOST_DEPTH 256

KERNEL write_tokens(CALL_PARAMETERS i64 which)
{
    __shared__ float keys[MOST_DEPTH];
    wait_previous();
    const Call call = MAKE_CALL;
    const int row = blockIdx.y, head = blockIdx.x, depth = (int)call.head_dim;
    if (row >= call.tokens()) return;
    const int s = sequence_of(call, row), rows = call.rows(s);
    if (!(which & (rows == 1 ? 1 : 2))) return;
    for (int c = threadIdx.x; c < depth; c += blockDim.x)
        keys[c] = rotated(call, at<float>(call.k) + row * call.k_stride + head * depth, at<i64>(call.positions)[row], c);
    if (call.keys_rotated) hadamard(keys, 1, depth, MOST_DEPTH);
    __syncthreads();
    store_token(call, s, head, row, call.slots(s, head) - rows + row - call.first_row(s), keys);
}

struct Rows {
    float q[HEADS][MOST_DEPTH], out[4][HEADS][MOST_DEPTH], weights[4][HEADS][32], tops[4][HEADS], sums[4][HEADS];
};

KERNEL attend_rows(CALL_PARAMETERS i64 which, i64 ranges)
{
    DYNAMIC_SHARED(float4, memory);
    Rows& shared = *reinterpret_cast<Rows*>(memory);
    wait_previous();
    const Call call = MAKE_CALL;
    const int row = blockIdx.y, depth = (int)call.head_dim, group = call.group(), parts = (group + HEADS - 1) / HEADS;
    const int head = blockIdx.x % (int)call.kv_heads, part = blockIdx.x / (int)call.kv_heads % parts;
    const int range = blockIdx.x / (int)call.kv_heads / parts;
    if (row >= call.tokens()) return;
    const int s = sequence_of(call, row), rows = call.rows(s);
    if (!(which & (rows == 1 ? 1 : 2))) return;
    const int heads = min(HEADS, group - HEADS * part), first = head * group + HEADS * part;
    const int high = call.slots(s, head) - rows + row - call.first_row(s) + 1, low = call.first_visible(high - 1);
    const Reads reads(call, s, head, row, low, high);
    const int size = (reads.parts() + (int)ranges - 1) / (int)ranges, used = (reads.parts() + size - 1) / size;
    if (range >= used) return;
    for (int n = threadIdx.x; n < heads * depth; n += blockDim.x)
        shared.q[n / depth][n % depth] = rotated(call, at<float>(call.q) + row * call.q_stride + (first + n / depth) * depth,
                                                 at<i64>(call.positions)[row], n % depth) * call.scale() * LOG2E;
    if (call.keys_rotated) hadamard(&shared.q[0][0], heads, depth, MOST_DEPTH);
    for (int n = threadIdx.x; n < 4 * HEADS * MOST_DEPTH; n += blockDim.x) (&shared.out[0][0][0])[n] = 0;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane < HEADS) shared.tops[warp][lane] = LOWEST, shared.sums[warp][lane] = 0;
    __syncthreads();
    const int* table = call.table(s, head);
    const int width = (depth + 31) / 32 * 32;
    for (int i = range * size + warp; i < min(reads.parts(), (range + 1) * size); i += 4) {
        const int slot = reads.slot(i, lane), entry = slot >= low && slot < high ? table[slot / PAGE] : -1;
        float score[HEADS] = {};
        if (entry >= 0) {
            const Page page(call.pools, entry);
            for (int c = 0; c < depth; c++) {
                const float x = key_at(page, depth, c, slot % PAGE);
#pragma unroll
                for (int h = 0; h < HEADS; h++) score[h] = fmaf(shared.q[h][c], x, score[h]);
            }
        }
        if (__all_sync(FULL_WARP, entry < 0)) continue;  // all hidden, or released
        for (int h = 0; h < heads; h++) {
            float x = LOWEST;
#pragma unroll
            for (int k = 0; k < HEADS; k++) x = k == h ? score[k] : x;
            const float old = shared.tops[warp][h], top = fmaxf(old, warp_max(entry >= 0 ? x : LOWEST)), factor = exp2f(old - top);
            const float weight = entry >= 0 ? exp2f(x - top) : 0, total = warp_sum(weight);
            shared.weights[warp][h][lane] = weight;
            for (int c = lane; c < depth; c += 32) shared.out[warp][h][c] *= factor;
            __syncwarp();
            if (lane == 0) shared.tops[warp][h] = top, shared.sums[warp][h] = shared.sums[warp][h] * factor + total;
        }
        __syncwarp();
        for (int c = lane; c < width; c += 32) {
            float sum[HEADS] = {};
            for (int t = 0; t < 32; t++) {
                const int from = __shfl_sync(FULL_WARP, entry, t), place = __shfl_sync(FULL_WARP, slot, t) % PAGE;
                if (from < 0 || c >= depth) continue;
                const float x = value_at(Page(call.pools, from), depth, place, c);
#pragma unroll
                for (int h = 0; h < HEADS; h++) sum[h] = fmaf(shared.weights[warp][h][t], x, sum[h]);
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++)
                if (h < heads && c < depth) shared.out[warp][h][c] += sum[h];
        }
        __syncwarp();
    }
    __syncthreads();
    for (int n = threadIdx.x; n < heads * depth; n += blockDim.x) {
        const int h = n / depth, c = n % depth;
        float best = LOWEST, x = 0, all = 0;
        for (int w = 0; w < 4; w++) best = fmaxf(best, shared.tops[w][h]);
        for (int w = 0; w < 4; w++) {
            const float factor = exp2f(shared.tops[w][h] - best);
            x += factor * shared.out[w][h][c], all += factor * shared.sums[w][h];
        }
        float* partial = partial_of(call, (int)ranges, row, head, range, HEADS * part + h);
        partial[c] = x;
        if (c == 0) partial[depth] = best, partial[depth + 1] = all;
    }
    if (last_to_arrive((row * (int)call.kv_heads + head) * parts + part, used))
        merge_ranges(call, row, s, head, HEADS * part, heads, row, (int)ranges, used, &shared.q[0][0], MOST_DEPTH, &shared.out[0][0][0],
                     4 * HEADS * MOST_DEPTH);
}
