// Which pages a decode step reads of each KV head: scores of its pages, and the best of them as a list.
// A block scores a part of a head's pages; the last one of a head to end chooses, or the last one of a sequence where heads choose
// together.
//   grid (kv_heads * parts, sequences), block 512 threads
//   bound    q's product with the middle of each channel's range, and `reach` times the most that the range can add (Quest, arXiv
//            2406.10774): of the parameters of quantised keys alone, or of rows of an index, which are made here when they are first
//            needed
//   peak     the largest product of a token's key with the sum of the group's queries (TidalDecode, arXiv 2410.05076)
//   mass     the softmax weight of the page's tokens, over the group
//   recency  how new a page is;  random: any order
// Other scores are there before (page_scores.py).
#include "page_bounds.cuh"
#include "selection.cuh"

#define MOST_DEPTH 256

struct Scoring {
    i64 pools[POOLS * FIELDS];
    float q[HEADS][MOST_DEPTH];
    float tops[SELECT_THREADS / 32], sums[SELECT_THREADS / 32];
};

// Lanes take eight neighbouring minima or steps each, CHUNKS times, SPAN lanes a page; a warp has AT_ONCE pages for each SPAN lanes
// under way.
template <int SPAN, int CHUNKS, int AT_ONCE>
__device__ __forceinline__ void bound_scores(const Selection& a, const Scoring& shared, int s, int head, int begin, int end, float* scores)
{
    const Call& call = a.call;
    const int depth = (int)call.head_dim, lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = call.group(), part = lane % SPAN;
    const float reach = __int_as_float((int)a.reach);
    const int* table = call.table(s, head);
    constexpr int TOGETHER_HEADS = CHUNKS == 1 ? 4 : 2;  // as many as registers hold
    for (int first = 0; first < group; first += TOGETHER_HEADS) {
        float w[TOGETHER_HEADS][8 * CHUNKS];
#pragma unroll
        for (int h = 0; h < TOGETHER_HEADS; h++)
#pragma unroll
            for (int i = 0; i < 8 * CHUNKS; i++) {
                const int c = 8 * (part + SPAN * (i / 8)) + i % 8;  // of 2 * depth
                const float x = c < 2 * depth ? shared.q[min(first + h, group - 1)][c < depth ? c : c - depth] : 0;
                w[h][i] = c < depth ? x : 0.5f * fmaf(fabsf(x), reach, x);
            }
        // pages of the block at once, and which of them is this lane's
        const int stride = SELECT_THREADS / SPAN, own = warp * (32 / SPAN) + lane / SPAN;
        for (int from_page = begin; from_page < end; from_page += SPAN * stride) {
            // each lane of SPAN looks a page up: the one of its SPAN lanes' turn number `part`
            const int sought = from_page + own + part * stride;
            const int known = sought < min(end, from_page + SPAN * stride) ? table[sought] : -1;
            for (int turn = 0; turn < SPAN && from_page + turn * stride < end; turn += AT_ONCE) {
                const int page0 = from_page + own + turn * stride;
                uint4 x[AT_ONCE][CHUNKS];
                float levels[AT_ONCE];
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
                    const int number = page0 + k * stride, entry = __shfl_sync(FULL_WARP, known, lane - part + turn + k);
                    levels[k] = -1;  // released, or none
                    i64 from = 0;
                    if (entry >= 0) {
                        const Page page(shared.pools, entry);
                        from = a.index_width >= 2 * depth ? (i64)a.index_row(s, head, number) : page.place(K_PARAMS);
                        levels[k] = a.index_width >= 2 * depth ? 1.0f : (float)page.pool[K_LEVELS];
                    }
#pragma unroll
                    for (int i = 0; i < CHUNKS; i++) {
                        const int c = 8 * (part + SPAN * i);
                        x[k][i] = from && c < 2 * depth ? *at<uint4>(from + 2 * c) : make_uint4(0, 0, 0, 0);
                    }
                }
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
                    float total[4] = {};
#pragma unroll
                    for (int i = 0; i < CHUNKS; i++) {
                        const float factor = 8 * (part + SPAN * i) < depth ? 1.0f : levels[k];
                        const u32 words[4] = {x[k][i].x, x[k][i].y, x[k][i].z, x[k][i].w};
#pragma unroll
                        for (int n = 0; n < 4; n++) {
                            float2 y = halves_to_floats(words[n]);
                            y.x *= factor, y.y *= factor;
#pragma unroll
                            for (int h = 0; h < TOGETHER_HEADS; h++)
                                total[h] = fmaf(y.x, w[h][8 * i + 2 * n], fmaf(y.y, w[h][8 * i + 2 * n + 1], total[h]));
                        }
                    }
                    if (TOGETHER_HEADS == 2) total[2] = total[0], total[3] = total[1];
                    // four sums over SPAN lanes: two steps leave each lane with one head's, which the others complete
                    const bool upper = lane & 1, second = lane & 2;
                    const float give0 = upper ? total[0] : total[2], give1 = upper ? total[1] : total[3];
                    const float a0 = (upper ? total[2] : total[0]) + __shfl_xor_sync(FULL_WARP, give0, 1);
                    const float a1 = (upper ? total[3] : total[1]) + __shfl_xor_sync(FULL_WARP, give1, 1);
                    float sum = (second ? a1 : a0) + __shfl_xor_sync(FULL_WARP, second ? a0 : a1, 2);
#pragma unroll
                    for (int step = 4; step < SPAN; step *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
                    sum = fmaxf(sum, __shfl_xor_sync(FULL_WARP, sum, 1));
                    sum = fmaxf(sum, __shfl_xor_sync(FULL_WARP, sum, 2));
                    const int number = page0 + k * stride;
                    if (part == 0 && number < end) scores[number] = levels[k] < 0 ? -infinity() : first ? fmaxf(scores[number], sum) : sum;
                }
            }
        }
    }
}

// Scores from the keys themselves: a lane is a token. Of mass, each query head's largest score and sum of weights in the page.
__device__ __forceinline__ void exact_scores(const Selection& a, const Scoring& shared, int s, int head, int begin, int end, int slots,
                                             float* scores)
{
    const Call& call = a.call;
    const int depth = (int)call.head_dim, lane = threadIdx.x % 32, group = call.group();
    for (int number = begin + threadIdx.x / 32; number < end; number += SELECT_THREADS / 32) {
        const int entry = call.table(s, head)[number];
        float* kept = at<float>(a.softmax) + ((s * call.kv_heads + head) * call.max_pages + number) * 2 * group;
        const bool there = entry >= 0 && number * PAGE + lane < slots;
        float x[HEADS] = {};
        if (there) {
            const Page page(call.pools, entry);
            for (int c = 0; c < depth; c++) {
                const float k = key_of(page, depth, c, lane);
#pragma unroll
                for (int h = 0; h < HEADS; h++) x[h] = fmaf(h < group ? shared.q[h][c] : 0, k, x[h]);
            }
        }
        if (a.score == PEAK) {
            float sum = 0;
#pragma unroll
            for (int h = 0; h < HEADS; h++) sum += x[h];
            const float best = warp_max(there ? sum : -infinity());
            if (lane == 0) scores[number] = best;
        } else {
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h >= group) continue;
                const float top = warp_max(there ? x[h] : LOWEST), sum = warp_sum(there ? __expf(x[h] - top) : 0.0f);
                if (lane == 0) kept[2 * h] = top, kept[2 * h + 1] = sum;
            }
        }
    }
}

// Of mass, once all pages' softmax parts are known: their share of the whole. By the last block of a head.
__device__ __forceinline__ void share_mass(const Selection& a, Scoring& shared, int s, int head, int total)
{
    const Call& call = a.call;
    const int group = call.group(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* scores = a.scores_of(s, head);
    const float* kept = at<float>(a.softmax) + (s * call.kv_heads + head) * call.max_pages * 2 * group;
    for (int page = threadIdx.x; page < total; page += SELECT_THREADS) scores[page] = 0;
    for (int h = 0; h < group; h++) {
        float top = LOWEST, sum = 0;
        for (int page = threadIdx.x; page < total; page += SELECT_THREADS)
            top = fmaxf(top, load_shared_by_all(kept + (page * group + h) * 2));
        top = warp_max(top);
        __syncthreads();
        if (lane == 0) shared.tops[warp] = top;
        __syncthreads();
        for (int w = 0; w < SELECT_THREADS / 32; w++) top = fmaxf(top, shared.tops[w]);
        for (int page = threadIdx.x; page < total; page += SELECT_THREADS) {
            const float* of_page = kept + (page * group + h) * 2;
            sum += load_shared_by_all(of_page + 1) * expf(load_shared_by_all(of_page) - top);
        }
        sum = warp_sum(sum);
        if (lane == 0) shared.sums[warp] = sum;
        __syncthreads();
        sum = 0;
        for (int w = 0; w < SELECT_THREADS / 32; w++) sum += shared.sums[w];
        for (int page = threadIdx.x; page < total; page += SELECT_THREADS) {
            const float* of_page = kept + (page * group + h) * 2;
            scores[page] += load_shared_by_all(of_page + 1) * expf(load_shared_by_all(of_page) - top) / sum;
        }
    }
    __threadfence();
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(SELECT_THREADS) select_pages(CALL_PARAMETERS SELECTION_ARGS(AS_PARAMETER) i64 parts)
{
    DYNAMIC_SHARED(float4, memory);
    Scoring& scoring = *reinterpret_cast<Scoring*>(memory);
    Choosing& choosing = *reinterpret_cast<Choosing*>(memory);
    const Selection a{MAKE_CALL, SELECTION_ARGS(AS_VALUE)};
    const Call& call = a.call;
    // nothing of this changes within a step but by this kernel
    const int s = blockIdx.y, head = blockIdx.x % (int)call.kv_heads, part = blockIdx.x / (int)call.kv_heads, depth = (int)call.head_dim;
    const bool runs = s < call.sequences() && at<i64>(call.selections)[s] != 0;
    const int row = call.first_row(s), group = call.group(), slots = runs ? call.slots(s, head) : 0, total = a.total(slots);
    for (int i = threadIdx.x; i < POOLS * FIELDS; i += SELECT_THREADS) scoring.pools[i] = at<i64>(call.pools)[i];
    const bool alone = a.combine == ALONE, scored = runs && a.scoring(s, head);
    const bool again = runs && (alone ? a.still_good(s, head) : a.all_still_good(s));
    const i64 position = runs ? at<i64>(call.positions)[row] : 0;
    const int2 range = !runs || a.score == MASS ? make_int2(0, total) : a.candidates(s, head, total);
    release_next();
    wait_previous();
    if (!runs) return;
    const int size = (max(range.y - range.x, 0) + (int)parts - 1) / (int)parts;
    const int begin = range.x + part * size, end = min(range.y, begin + size);
    float* found = a.scores_of(s, head);
    if (scored && begin < end && !a.scored_before()) {
        for (int n = threadIdx.x; n < group * depth; n += SELECT_THREADS)
            scoring.q[n / depth][n % depth] = rotated(call, at<float>(call.q) + row * call.q_stride + (head * group + n / depth) * depth,
                                                      position, n % depth) * call.scale();
        if (call.keys_rotated && (a.score == MASS || a.score == PEAK)) hadamard(&scoring.q[0][0], group, depth, MOST_DEPTH);
        __syncthreads();
        if (a.score == BOUND) {
            if (a.index_width >= 2 * depth) {
                const int known = *a.indexed_of(s, head);
                for (int page = max(begin, known) + threadIdx.x / 32; page < end; page += SELECT_THREADS / 32) {
                    const int entry = call.table(s, head)[page];
                    if (entry >= 0)
                        make_row(Page(call.pools, entry), depth, call.keys_rotated, a.index_row(s, head, page), threadIdx.x % 32);
                }
                __syncthreads();
            }
            if (depth <= 64) bound_scores<16, 1, 4>(a, scoring, s, head, begin, end, found);
            else if (depth <= 128) bound_scores<32, 1, 4>(a, scoring, s, head, begin, end, found);
            else bound_scores<32, 2, 1>(a, scoring, s, head, begin, end, found);
        } else if (a.score == RECENCY || a.score == RANDOM) {
            for (int page = begin + threadIdx.x; page < end; page += SELECT_THREADS) {
                u32 x = (u32)page * 2654435761u + (u32)head * 40503u + (u32)slots * 69621u;
                x = (x ^ x >> 15) * 2246822519u;
                found[page] = a.score == RECENCY ? (float)page : (float)((x ^ x >> 13) & 0xFFFFFF);
            }
        } else {
            exact_scores(a, scoring, s, head, begin, end, slots - 1, found);
        }
    }
    if (!last_to_arrive(s * (int)call.kv_heads + (alone ? head : 0), (int)(alone ? parts : parts * call.kv_heads))) return;
    const int first = alone ? head : 0, last = alone ? head + 1 : (int)call.kv_heads;
    if (scored) {
#pragma unroll 1
        for (int h = first; h < last && a.score == MASS; h++) share_mass(a, scoring, s, h, total);
        for (int page = threadIdx.x; page < total && !alone; page += SELECT_THREADS) {
            float sum = load_shared_by_all(a.scores_of(s, 0) + page);
            for (int h = 1; h < call.kv_heads; h++) {
                const float x = load_shared_by_all(a.scores_of(s, h) + page);
                sum = a.combine == BEST ? fmaxf(sum, x) : sum + x;
            }
            for (int h = 0; h < call.kv_heads; h++) a.scores_of(s, h)[page] = sum;
        }
        __threadfence();
        __syncthreads();
        if (a.indexes() && threadIdx.x < last - first) {
            const int h = first + threadIdx.x, until = a.candidates(s, h, a.total(call.slots(s, h))).y;
            *a.indexed_of(s, h) = max(*a.indexed_of(s, h), until);
        }
    }
#pragma unroll 1
    for (int h = first; h < last; h++) choose(a, choosing, s, h, again);
}
