// Decode that reads pages in part, of any format, in float32: no values of pages in which no score passes a threshold (Top-Theta, arXiv
// 2502.08363; kernels_cpu/attention_thresholds.py), of keys in two planes only the first where the step before was certain (SpAtten's
// progressive reads, arXiv 2012.09852). A block is one KV head of a sequence and a range of its pages, with all query heads of the group,
// CHUNK pages at a time: it scores them, a lane a token, decides, and adds up values, a thread a channel. The last block merges.
//   grid   (ranges, kv_heads, sequences); sequences with more than one row are left to the kernels of prefill.  block  256 threads
//   least  pages of a range: its best one is always read
#include "attention_merge.cuh"
#include "attention_reads.cuh"
#include "page_quads.cuh"

#define MOST_DEPTH 256
#define CHUNK 16
#define THREADS 256
#define WARPS (THREADS / 32)
static_assert(WARPS == HEADS, "a warp knows a head's softmax");
#define ROOM (HEADS * CHUNK * PAGE > MERGE_FLOATS ? HEADS * CHUNK * PAGE : MERGE_FLOATS)

struct Shared {
    float q[HEADS][MOST_DEPTH], room[ROOM];  // room: scores [HEADS][CHUNK * PAGE], then whatever is to be added up
    int entries[CHUNK], starts[CHUNK];
    u32 passing[HEADS];
    float factors[HEADS], shares[HEADS], confidence[HEADS];
};
static_assert(sizeof(Shared) == 25088, "attention_in_part.py");

// What a warp knows of its head, in powers of 2. top: the best score; dropped: the weight whose values are not read.
struct Softmax {
    float top = LOWEST, sum = 0, dropped = 0, before = LOWEST;

    // Which of a chunk's pages hold a score that `limit` lets pass, or the best so far.
    __device__ __forceinline__ u32 passing(const float* scores, int pages, float limit)
    {
        u32 found = 0, best = 0;
        before = top;
        for (int i = 0; i < pages; i++) {
            const float most = warp_max(scores[PAGE * i + threadIdx.x % 32]);
            if (most >= limit) found |= 1u << i;
            if (most > top) top = most, best = 1u << i;
        }
        return found | best;
    }
    // Scores become weights -> what those before are to be multiplied with.
    __device__ __forceinline__ float weigh(float* scores, int pages, u32 passing)
    {
        const float factor = exp2f(before - top);
        float all = 0, left = 0;
        for (int i = 0; i < pages; i++) {
            float& x = scores[PAGE * i + threadIdx.x % 32];
            x = exp2f(x - top);
            all += x, left += passing >> i & 1 ? 0 : x;
        }
        sum = sum * factor + warp_sum(all), dropped = dropped * factor + warp_sum(left);
        return factor;
    }
};

// Sums of what groups of `width` threads have, the same for all groups; threads behind the last whole group have nothing.
__device__ __forceinline__ float over_groups(float* room, int width, float x)
{
    __syncthreads();
    room[threadIdx.x] = x;
    __syncthreads();
    float sum = 0;
    for (int n = threadIdx.x % width; n < THREADS / width * width; n += width) sum += room[n];
    return sum;
}

// The sums of a head's values, with the slots in them that came since the last time: how many slots, how many of those have values, a
// channel's sum each.
__device__ __forceinline__ void sum_values(const Call& call, Shared& shared, float* held, const int* table, int slots)
{
    const int depth = (int)call.head_dim, width = (depth + 31) / 32 * 32, c = threadIdx.x % width, group = threadIdx.x / width;
    const int from = (int)held[0], groups = THREADS / width;
    float sum = 0, count = 0;
    for (int n = from / PAGE + group; n * PAGE < slots && group < groups && c < depth; n += groups) {
        if (table[n] < 0) continue;  // a released page has none
        const Page page(call.pools, table[n]);
        const int first = max(from - n * PAGE, 0), end = min(PAGE, slots - n * PAGE);
        for (int t = first; t < end; t++) sum += value_at(page, depth, t, c);
        count += end - first;
    }
    sum = over_groups(shared.room, width, sum), count = over_groups(shared.room, width, count);
    if (threadIdx.x < depth) held[2 + c] += sum;
    if (threadIdx.x == 0) held[0] = slots, held[1] += count;
    __syncthreads();
}

// Behind merge_ranges: how certain the step was, and the mean of the values for the weight that was left out. held: value sums, or null.
__device__ __forceinline__ void settle(const Call& call, Shared& shared, int s, int head, int row, int ranges, int used, float* confidence,
                                       float* held)
{
    const int depth = (int)call.head_dim, group = call.group(), lane = threadIdx.x % 32, h = threadIdx.x / 32;
    if (h < group) {
        const float *own = partial_of(call, ranges, s, head, 0, h) + depth, *dropped = call.dropped(s, head);
        const int next = group * (depth + 4);
        float best = LOWEST, extra = LOWEST, total = 0, left = 0;
        for (int r = lane; r < used; r += 32) best = fmaxf(best, load_shared_by_all(own + r * next));
        best = warp_max(best);
        if (dropped) {
            float z = 0;
            for (int i = lane; i < depth; i += 32) z += shared.q[h][i] * dropped[1 + i];
            extra = warp_sum(z) + log2f(dropped[0]);
        }
        const float top = fmaxf(best, extra);
        for (int r = lane; r < used; r += 32) {
            const float4 about = load_four(own + r * next);
            total += exp2f(about.x - top) * about.y, left += exp2f(about.x - top) * about.z;
        }
        total = warp_sum(total) + (dropped ? exp2f(extra - top) : 0), left = warp_sum(left);
        if (lane == 0) shared.shares[h] = total > 0 ? left / total : 0, shared.confidence[h] = total > 0 ? exp2f(best - top) / total : 1;
    }
    __syncthreads();
    float least = 1, most = 0;
    for (int n = 0; n < group; n++) least = fminf(least, shared.confidence[n]), most = fmaxf(most, shared.shares[n]);
    if (confidence && threadIdx.x == 0) *confidence = least;
    if (!held || most == 0) return;
    sum_values(call, shared, held, call.table(s, head), call.slots(s, head));
    for (int n = threadIdx.x; n < group * depth; n += THREADS)
        at<float>(call.out)[row * call.out_stride + head * group * depth + n] +=
            shared.shares[n / depth] * held[2 + n % depth] / fmaxf(held[1], 1);
}

// thresholds: alpha and beta of each query head, so that of n tokens scores of alpha + beta ln n pass; 0: all do. progressive: bits of the
// least weight that makes a step certain; 0: no step is.
KERNEL attend_in_part(CALL_PARAMETERS i64 thresholds, i64 value_sums, i64 progressive, i64 confidences, i64 ranges, i64 least)
{
    DYNAMIC_SHARED(float4, memory);
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    wait_previous();
    const Call call = MAKE_CALL;
    const int s = blockIdx.z, head = blockIdx.y, range = blockIdx.x, depth = (int)call.head_dim, group = call.group();
    if (s >= call.sequences() || call.rows(s) != 1) return;
    const int row = call.first_row(s), slots = call.slots(s, head), low = call.first_visible(slots - 1);
    const Reads reads(call, s, head, row, low, slots);
    const int size = max((reads.page_count + (int)ranges - 1) / (int)ranges, (int)least);
    const int used = max(1, (reads.page_count + size - 1) / size);
    if (range >= used) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = (depth + 31) / 32 * 32;
    const int c = threadIdx.x % width, own = threadIdx.x / width, groups = THREADS / width;
    const bool adds = own < groups && c < depth;
    for (int n = threadIdx.x; n < HEADS * depth; n += THREADS)
        shared.q[n / depth][n % depth] = n / depth < group ? rotated(call, at<float>(call.q) + row * call.q_stride + head * group * depth +
            n - n % depth, at<i64>(call.positions)[row], n % depth) * call.scale() * LOG2E : 0;
    if (call.keys_rotated) hadamard(&shared.q[0][0], group, depth, MOST_DEPTH);
    float* confidence = progressive ? at<float>(at<i64>(confidences)[s]) + call.layer * call.kv_heads + head : nullptr;
    const bool coarse = confidence && *confidence >= __int_as_float((int)progressive);
    const bool spares = thresholds && call.selections && at<i64>(call.selections)[s];
    float limit = -infinity();
    if (spares && warp < group) {
        const float* curve = at<float>(thresholds) + 2 * (head * group + warp);
        limit = (curve[0] + curve[1] * logf((float)slots)) * LOG2E;
    }
    const int* table = call.table(s, head);
    Softmax softmax;
    float sum[HEADS] = {};
    for (int first = range * size; first < min(reads.page_count, (range + 1) * size); first += CHUNK) {
        const int pages = min(CHUNK, min(reads.page_count, (range + 1) * size) - first);
        __syncthreads();
        if (threadIdx.x < pages) {
            const int start = reads.slot(first + threadIdx.x, 0);
            shared.starts[threadIdx.x] = start, shared.entries[threadIdx.x] = table[start / PAGE];
        }
        __syncthreads();
        for (int i = warp; i < pages; i += WARPS) {
            const int entry = shared.entries[i], slot = shared.starts[i] + lane;
            const bool seen = entry >= 0 && slot >= low && slot < slots;
            float score[HEADS] = {};
            if (entry >= 0) {
                const Page page(call.pools, entry);
#pragma unroll 2
                for (int quad = 0; quad < depth / 4; quad++) {
                    const float4 x = keys_of_quad(page, depth, quad, lane, coarse);
#pragma unroll
                    for (int h = 0; h < HEADS; h++) {
                        const float4 q = *reinterpret_cast<const float4*>(&shared.q[h][4 * quad]);
                        score[h] = fmaf(q.x, x.x, fmaf(q.y, x.y, fmaf(q.z, x.z, fmaf(q.w, x.w, score[h]))));
                    }
                }
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) shared.room[(h * CHUNK + i) * PAGE + lane] = seen ? score[h] : -infinity();
        }
        __syncthreads();
        float* scores = shared.room + warp * CHUNK * PAGE;
        const u32 passing = warp < group ? softmax.passing(scores, pages, limit) : 0;
        if (lane == 0) shared.passing[warp] = passing;
        __syncthreads();
        u32 all = 0;
#pragma unroll
        for (int h = 0; h < HEADS; h++) all |= shared.passing[h];
        const float factor = warp < group ? softmax.weigh(scores, pages, all) : 0;
        if (lane == 0) shared.factors[warp] = factor;
        __syncthreads();
#pragma unroll
        for (int h = 0; h < HEADS; h++) sum[h] *= shared.factors[h];
        for (int i = 0, n = 0; i < pages && adds; i++) {
            if (!(all >> i & 1) || shared.entries[i] < 0 || n++ % groups != own) continue;
            const Page page(call.pools, shared.entries[i]);
            const int written = slots - shared.starts[i];  // what was never written may be no numbers
#pragma unroll 2
            for (int quad = 0; quad < PAGE / 4; quad++) {
                float4 x = values_of_quad(page, depth, quad, c);
                if (4 * quad + 3 >= written)
                    x = make_float4(4 * quad < written ? x.x : 0, 4 * quad + 1 < written ? x.y : 0, 4 * quad + 2 < written ? x.z : 0, 0);
#pragma unroll
                for (int h = 0; h < HEADS; h++) {
                    const float4 w = *reinterpret_cast<const float4*>(shared.room + (h * CHUNK + i) * PAGE + 4 * quad);
                    sum[h] = fmaf(w.x, x.x, fmaf(w.y, x.y, fmaf(w.z, x.z, fmaf(w.w, x.w, sum[h]))));
                }
            }
        }
    }
#pragma unroll
    for (int h = 0; h < HEADS; h++) {
        const float found = over_groups(shared.room, width, adds ? sum[h] : 0);
        if (h < group && threadIdx.x < depth) partial_of(call, (int)ranges, s, head, range, h)[c] = found;
    }
    if (warp < group && lane == 0) {
        float* about = partial_of(call, (int)ranges, s, head, range, warp) + depth;
        about[0] = softmax.top, about[1] = softmax.sum, about[2] = softmax.dropped;
    }
    if (!last_to_arrive(s * (int)call.kv_heads + head, used)) return;
    merge_ranges(call, s, s, head, 0, group, row, (int)ranges, used, &shared.q[0][0], MOST_DEPTH, shared.room, ROOM);
    __syncthreads();
    const i64 sums = spares && value_sums ? at<i64>(value_sums)[s] : 0;
    settle(call, shared, s, head, row, (int)ranges, used, confidence,
           sums ? at<float>(sums) + (call.layer * call.kv_heads + head) * (2 + depth) : nullptr);
}
