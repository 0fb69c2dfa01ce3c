// Scores of pages by the keys themselves, where all query heads of a layer choose together: select_pages' rank and max_mass, for which it
// finds the scores made. In float32, pages of any format; a lane is a token.
//   token_scores  rank: each query head's best token of each page. max_mass: its softmax's part in each page, and by the last block of a
//                 KV head the whole of it
//   grid (kv_heads * parts, sequences), block 512 threads, as select_pages; shared: group * head_dim floats
//   rank_pages    a block is a query head: its best pages, as many as there is room for, in turn (LessIsMore, arXiv 2508.07101)
//   grid (num_heads, sequences), block 512, shared Choosing
//   most_mass     of each token the largest weight that a query head of the layer gives it, summed over the page (DELTA, arXiv 2510.09883);
//                 to KV head 0, zeros to the others. Grid (parts, sequences), block 512, shared: num_heads * head_dim floats
#include "page_scores.cuh"

// What lies behind the scores, for each (sequence, query head): of rank its best token's score page by page, and numbers of pages; of
// max_mass the largest score and the sum of weights page by page, and of all tokens, then 1 / sum.
struct Kept {
    const Selection& a;
    int s;

    __device__ __forceinline__ i64 all() const { return gridDim.y * a.call.num_heads * a.call.max_pages; }
    __device__ __forceinline__ i64 row(int h) const { return (s * a.call.num_heads + h) * a.call.max_pages; }
    __device__ __forceinline__ float* best(int h) const { return at<float>(a.softmax) + row(h); }
    __device__ __forceinline__ int* order(int h) const { return at<int>(a.softmax) + all() + row(h); }
    __device__ __forceinline__ float* part(int h, int page) const { return at<float>(a.softmax) + 2 * (row(h) + page); }
    __device__ __forceinline__ float* whole(int h) const { return at<float>(a.softmax) + 2 * (all() + s * a.call.num_heads + h); }
};

// Of one token with the group's queries, q [group][head_dim]. What a page is asked for but once stays out of the loops, whose turns are
// under way together.
__device__ __forceinline__ void score_token(const Call& call, const float* q, int entry, int t, float (&x)[HEADS])
{
    const int depth = (int)call.head_dim, group = call.group();
    const Page page(call.pools, entry);
    const int kind = page.kind(K_KIND);
    const i64 from = page.place(K), params = page.place(K_PARAMS);
#pragma unroll
    for (int h = 0; h < HEADS; h++) x[h] = 0;
    auto add = [&](int quad, const float4& k) {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (h >= group) break;
            const float4 y = *reinterpret_cast<const float4*>(q + h * depth + 4 * quad);
            x[h] = fmaf(y.x, k.x, fmaf(y.y, k.y, fmaf(y.z, k.z, fmaf(y.w, k.w, x[h]))));
        }
    };
    if (kind == INT4 && page.kind(K_AXIS) == BY_ROW) {
#pragma unroll 4
        for (int quad = 0; quad < depth / 4; quad++) add(quad, four_codes(from, params, depth, quad, t));
    } else if (kind == F16) {
        const u16* keys = at<u16>(from) + t;
#pragma unroll 4
        for (int quad = 0; quad < depth / 4; quad++) {
            const u16* four = keys + 4 * PAGE * quad;
            add(quad, make_float4(half_to_float(four[0]), half_to_float(four[PAGE]), half_to_float(four[2 * PAGE]),
                                  half_to_float(four[3 * PAGE])));
        }
    } else {
#pragma unroll 1
        for (int quad = 0; quad < depth / 4; quad++) add(quad, four_keys(page, depth, quad, t));
    }
}

SCORING(token_scores)
{
    DYNAMIC_SHARED(float, turned);
    __shared__ float tops[WARPS], sums[WARPS];
    release_next();
    wait_previous();
    const Selection a = MAKE_SELECTION;
    const Call& call = a.call;
    const int s = blockIdx.y, head = blockIdx.x % (int)call.kv_heads, part = blockIdx.x / (int)call.kv_heads, group = call.group();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (!a.chooses(s, head)) return;
    const Kept kept{a, s};
    const int slots = call.slots(s, head), total = a.total(slots);
    const int2 range = a.score == RANK ? a.candidates(s, head, total) : make_int2(0, total);
    const int size = (max(range.y - range.x, 0) + (int)parts - 1) / (int)parts, end = min(range.y, range.x + part * size + size);
    prepare_queries(call, s, head * group, group, turned);
    for (int page = range.x + part * size + warp; page < end; page += WARPS) {
        const int entry = call.table(s, head)[page];
        const bool there = entry >= 0 && page * PAGE + lane < slots - 1;  // the newest token is in no page yet
        float x[HEADS] = {};
        if (there) score_token(call, turned, entry, lane, x);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            if (h >= group) break;
            const float top = warp_max(there ? x[h] : LOWEST);
            if (a.score == RANK) {
                if (lane == 0) kept.best(head * group + h)[page] = entry < 0 ? -infinity() : top;
            } else {
                const float sum = warp_sum(there ? __expf(x[h] - top) : 0.0f);
                float* part_of = kept.part(head * group + h, page);
                if (lane == 0) part_of[0] = top, part_of[1] = sum;
            }
        }
        if (a.score == RANK && lane == 0) a.scores_of(s, head)[page] = -infinity();
    }
    if (a.score == RANK || !last_to_arrive(s * (int)call.kv_heads + head, (int)parts)) return;
    for (int h = head * group; h < (head + 1) * group; h++) {
        float top = LOWEST, sum = 0;
        for (int page = threadIdx.x; page < total; page += SELECT_THREADS) top = fmaxf(top, load_shared_by_all(kept.part(h, page)));
        top = warp_max(top);
        if (lane == 0) tops[warp] = top;
        __syncthreads();
        for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w]);
        for (int page = threadIdx.x; page < total; page += SELECT_THREADS)
            sum += load_shared_by_all(kept.part(h, page) + 1) * expf(load_shared_by_all(kept.part(h, page)) - top);
        sum = warp_sum(sum);
        if (lane == 0) sums[warp] = sum;
        __syncthreads();
        if (threadIdx.x) continue;
        sum = 0;
        for (int w = 0; w < WARPS; w++) sum += sums[w];
        kept.whole(h)[0] = top, kept.whole(h)[1] = 1 / sum;
    }
}

SCORING(rank_pages)
{
    DYNAMIC_SHARED(float4, memory);
    Choosing& choosing = *reinterpret_cast<Choosing*>(memory);
    release_next();
    wait_previous();
    const Selection a = MAKE_SELECTION;
    const Call& call = a.call;
    const int s = blockIdx.y, h = blockIdx.x, head = h / call.group();
    if (!a.chooses(s, head)) return;
    const Kept kept{a, s};
    const int slots = call.slots(s, head), total = a.total(slots);
    const int2 range = a.candidates(s, head, total);
    const int free = min(a.wanted(s, head, slots), total) - (total - range.y) - range.x;
    if (free <= 0 || range.y <= range.x) return;
    const float* best = kept.best(h);
    int* order = kept.order(h);
    int unused;
    const int count = top_pages(choosing, best, range.x, range.y, free, order, nullptr, 0, unused);
    float* others = reinterpret_cast<float*>(choosing.bins);
    u32* found = reinterpret_cast<u32*>(a.scores_of(s, head));
    for (int from = 0; from < count; from += SELECT_THREADS) {
        const int i = from + (int)threadIdx.x;
        __syncthreads();
        const float own = i < count ? best[order[i]] : 0;
        int place = 0;
        for (int first = 0; first < count; first += BINS) {
            const int until = min(BINS, count - first);
            __syncthreads();
            for (int o = threadIdx.x; o < until; o += SELECT_THREADS) others[o] = best[order[first + o]];
            __syncthreads();
            for (int o = 0; o < until; o++) place += others[o] > own || (others[o] == own && first + o < i);
        }
        // of floats below 0 the largest has the smallest bits
        if (i < count) atomicMin(found + order[i], __float_as_uint((float)(place * (int)call.num_heads + h)) | 0x80000000u);
    }
}

SCORING(most_mass)
{
    DYNAMIC_SHARED(float, turned);
    release_next();
    wait_previous();
    const Selection a = MAKE_SELECTION;
    const Call& call = a.call;
    const int s = blockIdx.y, lane = threadIdx.x % 32, group = call.group(), depth = (int)call.head_dim;
    if (!a.chooses(s, 0)) return;
    const Kept kept{a, s};
    const int2 range = a.candidates(s, 0, a.total(call.slots(s, 0)));
    const int size = (max(range.y - range.x, 0) + (int)parts - 1) / (int)parts, begin = range.x + blockIdx.x * size;
    if (begin >= range.y) return;
    prepare_queries(call, s, 0, (int)call.num_heads, turned);
    for (int page = begin + threadIdx.x / 32; page < min(range.y, begin + size); page += WARPS) {
        float most = 0;
        for (int head = 0; head < call.kv_heads; head++) {
            const int entry = call.table(s, head)[page];
            if (entry < 0 || page * PAGE + lane >= call.slots(s, head) - 1) continue;
            float x[HEADS];
            score_token(call, turned + head * group * depth, entry, lane, x);
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                if (h >= group) break;
                const float* whole = kept.whole(head * group + h);
                most = fmaxf(most, __expf(x[h] - whole[0]) * whole[1]);
            }
        }
        most = warp_sum(most);
        for (int head = lane; head < call.kv_heads; head += 32) a.scores_of(s, head)[page] = head ? 0 : most;
    }
}
