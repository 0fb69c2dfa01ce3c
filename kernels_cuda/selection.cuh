// A call of select_pages: which pages scores decide about, and from scores to lists (selections in attention_call.cuh).
#pragma once
#include "attention_merge.cuh"

#define SELECT_THREADS 512
#define STAGED 8192    // scores that a block holds in shared memory while it chooses
#define OWN (STAGED / SELECT_THREADS)
#define LONGEST 16     // steps that a list serves at most
enum Score { BOUND, MASS, RECENCY, RANDOM, PEAK = 20 };
enum Combine { ALONE, LAYER, BEST };
enum Stat { SPARSE, DENSE, READ, HELD, REUSED, STATS };

#define SELECTION_ARGS(X) X(sealed) X(index) X(indexed) X(index_width) X(scores) X(shares) X(stats) X(score) X(combine) X(budget) X(fraction) X(recent) \
    X(reach) X(reuse) X(block) X(softmax)

struct Selection {
    Call call;
    SELECTION_ARGS(AS_FIELD)

    __device__ __forceinline__ int total(int slots) const { return (slots + PAGE - 1) / PAGE; }
    __device__ __forceinline__ float* scores_of(int s, int head) const { return at<float>(scores) + (s * call.kv_heads + head) * call.max_pages; }
    __device__ __forceinline__ u16* index_row(int s, int head, int page) const {
        return at<u16>(at<i64>(index)[s]) + ((call.layer * call.kv_heads + head) * call.max_pages + page) * index_width;
    }
    __device__ __forceinline__ int* indexed_of(int s, int head) const { return at<int>(at<i64>(indexed)[s]) + call.layer * call.kv_heads + head; }
    __device__ __forceinline__ int sealed_of(int s, int head) const { return at<int>(at<i64>(sealed)[s])[call.layer * call.kv_heads + head]; }
    // The pages that scores decide about: between the first page, or block, and the recent ones.
    __device__ __forceinline__ int2 candidates(int s, int head, int pages) const {
        const int known = sealed_of(s, head), each = max(1, (int)block);
        int last = pages - (int)recent;
        if (score == BOUND && (known > 1 || index_width < 2 * call.head_dim)) last = min(last, known);
        last = max(1, last / each * each);
        return make_int2(min(each, last), last);
    }
    __device__ __forceinline__ int wanted(int s, int head, int slots) const {
        const float share = at<float>(shares)[call.layer * call.kv_heads + head];
        if (share < 0) return 1 << 30;
        return (int)ceilf(share * fmaxf((float)budget, __int_as_float((int)fraction) * (float)slots) / (float)PAGE);
    }
    __device__ __forceinline__ bool still_good(int s, int head) const {
        const int* row = call.list_row(s, head);
        return row[COUNT] >= 1 && row[SLOTS] + row[AGE] + 1 == call.slots(s, head) && row[AGE] + 1 < row[INTERVAL];
    }
    __device__ __forceinline__ bool all_still_good(int s) const {
        bool good = true;
        for (int head = 0; head < call.kv_heads; head++) good = good && still_good(s, head);
        return good;
    }
    // Whether a head's pages are to be scored.
    __device__ __forceinline__ bool scoring(int s, int head) const {
        if (combine == ALONE) return !still_good(s, head) && wanted(s, head, call.slots(s, head)) < total(call.slots(s, head));
        bool some = false;
        for (int other = 0; other < call.kv_heads; other++) some = some || wanted(s, other, call.slots(s, other)) < total(call.slots(s, other));
        return some && !all_still_good(s);
    }
};

// Ascends with the float.
__device__ __forceinline__ u32 order_of(float x)
{
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Choosing {
    float staged[STAGED];
    u32 counts[3], sums[SELECT_THREADS / 32];
};

__device__ __forceinline__ u32 block_sum(Choosing& shared, u32 x, int turn)
{
    x = __reduce_add_sync(FULL_WARP, x);
    if (threadIdx.x % 32 == 0) atomicAdd(&shared.counts[turn % 3], x);
    if (threadIdx.x == 0) shared.counts[(turn + 1) % 3] = 0;  // two barriers away from both its uses
    __syncthreads();
    return shared.counts[turn % 3];
}

// Of the scores first ... last (at `scores`, no NaN; -infinity: never) the `wanted` best ones, of equals the lower page, ascending to `pages`; -> how
// many. kept: how many of `old` ascending ones, which lie in `pages` now, are among them.
__device__ __forceinline__ int top_pages(Choosing& shared, const float* scores, int first, int last, int wanted, int* pages, const int* old, int old_count,
                                         int& kept)
{
    const int count = last - first, each = (count + SELECT_THREADS - 1) / SELECT_THREADS, begin = threadIdx.x * each, end = min(count, begin + each);
    const bool fits = count <= STAGED;
    if (threadIdx.x < 3) shared.counts[threadIdx.x] = 0;
    for (int i = threadIdx.x; i < min(count, STAGED); i += SELECT_THREADS) shared.staged[i] = load_shared_by_all(scores + first + i);
    __syncthreads();
    float own[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) own[i] = fits && begin + i < end ? shared.staged[begin + i] : -infinity();
    auto score = [&](int i) { return i < STAGED ? shared.staged[i] : load_shared_by_all(scores + first + i); };
    auto above = [&](u32 limit) {
        u32 n = 0;
        if (fits) {
#pragma unroll
            for (int i = 0; i < OWN; i++) n += own[i] > -infinity() && order_of(own[i]) >= limit;
        } else {
            for (int i = begin; i < end; i++) n += score(i) > -infinity() && order_of(score(i)) >= limit;
        }
        return n;
    };
    int turn = 0;
    const u32 possible = block_sum(shared, above(0), turn++);
    wanted = min(wanted, (int)possible);
    u32 limit = 0;  // at least `wanted` are at or above it
    if (wanted < possible)
        for (int bit = 31; bit >= 0; bit--) {
            const u32 higher = limit | 1u << bit, n = block_sum(shared, above(higher), turn++);
            if (n >= wanted) limit = higher;
            if (n == wanted) break;
        }
    kept = 0;
    if (old_count) {
        u32 mine = 0;
        for (int i = threadIdx.x; i < old_count; i += SELECT_THREADS) {
            const int page = old[i] - first;
            mine += page >= 0 && page < count && score(page) > -infinity() && order_of(score(page)) >= limit;
        }
        kept = block_sum(shared, mine, turn++);
        __syncthreads();  // `old` is about to be written
    }
    u32 more = 0, equal = 0;
    for (int i = begin; i < end; i++) {
        const float x = score(i);
        more += x > -infinity() && order_of(x) > limit, equal += x > -infinity() && order_of(x) == limit;
    }
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 before = (u64)more | (u64)equal << 32;
    for (int step = 1; step < 32; step *= 2) {
        const u64 other = __shfl_up_sync(FULL_WARP, before, step);
        if (lane >= step) before += other;
    }
    __shared__ u64 sums[SELECT_THREADS / 32];
    if (lane == 31) sums[warp] = before;
    __syncthreads();
    u64 all = 0;
    for (int w = 0; w < SELECT_THREADS / 32; w++) {
        if (w < warp) before += sums[w];
        all += sums[w];
    }
    before -= (u64)more | (u64)equal << 32;
    const int ties = wanted - (int)(u32)all;  // of those at the limit, the first ones
    int larger = (int)(u32)before, alike = (int)(before >> 32);
    for (int i = begin; i < end; i++) {
        const float x = score(i);
        if (!(x > -infinity())) continue;
        const u32 order = order_of(x);
        if (order > limit || (order == limit && alike < ties)) pages[larger + min(alike, ties)] = first + i;
        larger += order > limit, alike += order == limit;
    }
    return wanted;
}

// Make one head's list anew, or use it again. All threads of a block.
__device__ __forceinline__ void choose(const Selection& a, Choosing& shared, int s, int head, bool again)
{
    const int slots = a.call.slots(s, head), total = a.total(slots);
    int* row = a.call.list_row(s, head);
    __syncthreads();
    const int count = row[COUNT], age = row[AGE], interval = row[INTERVAL];
    const bool follows = count >= 0 && row[SLOTS] + age + 1 == slots;
    __syncthreads();
    int reads = total;
    bool dense = false;
    if (again) {  // a list that is still good gets the page begun since
        const bool begun = row[HEADER + count - 1] < total - 1;
        __syncthreads();
        if (threadIdx.x == 0) {
            row[AGE] = age + 1;
            if (begun) row[HEADER + count] = total - 1, row[COUNT] = count + 1;
        }
        reads = count + begun;
    } else {
        const int each = max(1, (int)a.block), wanted = a.wanted(s, head, slots);
        const int2 range = a.candidates(s, head, total);
        const int free = max(wanted - (total - range.y) - range.x, 0) / each * each;
        dense = wanted >= total || free >= range.y - range.x || total - range.y + range.x + free > a.call.selection_capacity - 2;
        if (dense) {
            if (threadIdx.x == 0) row[COUNT] = ALL, row[SLOTS] = slots, row[AGE] = 0, row[INTERVAL] = 1;
        } else {
            const float reuse = __int_as_float((int)a.reuse);
            int kept;
            const int found = free ? top_pages(shared, a.scores_of(s, head), range.x, range.y, free, row + HEADER + range.x, row + HEADER,
                                               reuse > 0 && follows ? count : 0, kept) : 0;
            if (!free) kept = 0;
            for (int page = threadIdx.x; page < range.x; page += SELECT_THREADS) row[HEADER + page] = page;
            for (int page = range.y + threadIdx.x; page < total; page += SELECT_THREADS) row[HEADER + range.x + found + page - range.y] = page;
            reads = range.x + found + total - range.y;
            if (threadIdx.x == 0) {
                int next = 1;
                if (reuse > 0 && follows) next = (float)kept / (float)max(found, 1) >= reuse ? min(2 * interval, LONGEST) : max(interval / 2, 1);
                row[COUNT] = reads, row[SLOTS] = slots, row[AGE] = 0, row[INTERVAL] = next;
            }
        }
    }
    if (a.stats && threadIdx.x == 0) {
        u64* stats = at<u64>(a.stats) + STATS * a.call.layer;
        atomicAdd(stats + (dense ? DENSE : SPARSE), 1ull), atomicAdd(stats + READ, (u64)reads), atomicAdd(stats + HELD, (u64)total);
        atomicAdd(stats + REUSED, (u64)again);
    }
}
