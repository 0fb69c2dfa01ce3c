// A call of select_pages: which pages scores decide about, and from scores to lists (selections in attention_call.cuh).
#pragma once
#include "attention_merge.cuh"

#define SELECT_THREADS 512
#define OWN 8          // scores that a thread holds in registers while it chooses; beyond 4,096 pages it reads them again
#define MOST_CANDIDATES 32768
#define BIN_BITS 11
#define BINS (1 << BIN_BITS)
#define LISTED 64      // scores that are compared with each other
#define LONGEST 16     // steps that a list serves at most
enum Score { BOUND, MASS, RECENCY, RANDOM, HIERARCHY = 10, REPRESENTATIVES, LANDMARKS, COMPONENTS, COLLISIONS, PEAK = 20, RANK, MAX_MASS };
enum Combine { ALONE, LAYER, BEST };
enum Stat { SPARSE, DENSE, READ, HELD, REUSED, STATS };

#define SELECTION_ARGS(X) X(sealed) X(index) X(indexed) X(index_width) X(scores) X(shares) X(stats) X(score) X(combine) X(budget) \
    X(fraction) X(recent) X(reach) X(reuse) X(block) X(softmax)

struct Selection {
    Call call;
    SELECTION_ARGS(AS_FIELD)

    __device__ __forceinline__ int total(int slots) const { return (slots + PAGE - 1) / PAGE; }
    __device__ __forceinline__ float* scores_of(int s, int head) const {
        return at<float>(scores) + (s * call.kv_heads + head) * call.max_pages;
    }
    __device__ __forceinline__ u16* index_row(int s, int head, int page) const {
        return at<u16>(at<i64>(index)[s]) + ((call.layer * call.kv_heads + head) * call.max_pages + page) * index_width;
    }
    __device__ __forceinline__ int* indexed_of(int s, int head) const {
        return at<int>(at<i64>(indexed)[s]) + call.layer * call.kv_heads + head;
    }
    __device__ __forceinline__ int sealed_of(int s, int head) const {
        return at<int>(at<i64>(sealed)[s])[call.layer * call.kv_heads + head];
    }
    // The pages that scores decide about: between the first page, or block, and the recent ones.
    __device__ __forceinline__ int2 candidates(int s, int head, int pages) const { return candidates_of(sealed_of(s, head), pages); }
    __device__ __forceinline__ int2 candidates_of(int known, int pages) const {
        const int each = max(1, (int)block);
        int last = pages - (int)recent;
        // without rows of bounds quantised pages alone have them
        const bool unknown = (score == BOUND || score == HIERARCHY) && index_width < 2 * call.head_dim;
        if (unknown || indexes() && known > 1) last = min(last, known);
        last = max(1, last / each * each);
        return make_int2(min(each, last), last);
    }
    __device__ __forceinline__ float share_of(int head) const { return at<float>(shares)[call.layer * call.kv_heads + head]; }
    __device__ __forceinline__ int wanted(int s, int head, int slots) const { return wanted_of(share_of(head), slots); }
    __device__ __forceinline__ int wanted_of(float share, int slots) const {
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
        for (int other = 0; other < call.kv_heads; other++)
            some = some || wanted(s, other, call.slots(s, other)) < total(call.slots(s, other));
        return some && !all_still_good(s);
    }
    // Whether a sequence chooses in this step, and its head's pages are to be scored.
    __device__ __forceinline__ bool chooses(int s, int head) const {
        return s < call.sequences() && at<i64>(call.selections)[s] != 0 && scoring(s, head);
    }
    // Whether kernels before select_pages have made the scores.
    __device__ __forceinline__ bool scored_before() const {
        return score == RANK || score == MAX_MASS || score >= HIERARCHY && score <= COLLISIONS;
    }
    // Whether scores are by rows of an index, which are good up to the last page that scores decide about.
    __device__ __forceinline__ bool indexes() const {
        return score == BOUND && index_width >= 2 * call.head_dim || score >= HIERARCHY && score <= COLLISIONS;
    }
};

// Ascends with the float.
__device__ __forceinline__ u32 order_of(float x)
{
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Choosing {
    u32 bins[BINS], words[MOST_CANDIDATES / 32], orders[LISTED], sums[SELECT_THREADS / 32];
    int places[LISTED];
    u32 low, high, possible, bin, above, within, listed;
};

// Sum over the lanes up to this one.
__device__ __forceinline__ u32 sum_until(u32 x)
{
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_up_sync(FULL_WARP, x, step);
        if ((int)threadIdx.x % 32 >= step) x += other;
    }
    return x;
}

// Sum over the threads before this one, and over all. A barrier before and after.
__device__ __forceinline__ u32 sum_before(Choosing& shared, u32 x, u32& all)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 until = sum_until(x);
    __syncthreads();
    if (lane == 31) shared.sums[warp] = until;
    __syncthreads();
    all = 0;
    u32 before = until - x;
#pragma unroll
    for (int w = 0; w < SELECT_THREADS / 32; w++) {
        if (w < warp) before += shared.sums[w];
        all += shared.sums[w];
    }
    return before;
}

// The scores that a thread looks at.
struct Scores {
    const float (&own)[OWN];
    const float* all;
    int count, turns;

    // body(order, place) for each; order 0: none. All threads take as many turns.
    template <class Body> __device__ __forceinline__ void each(Body body) const
    {
#pragma unroll
        for (int k = 0; k < OWN; k++)
            if (k < turns) body(own[k] > -infinity() ? order_of(own[k]) : 0u, k * SELECT_THREADS + (int)threadIdx.x);
        for (int k = OWN; k < turns; k++) {
            const int i = k * SELECT_THREADS + threadIdx.x;
            const float x = i < count ? load_shared_by_all(all + i) : -infinity();
            body(x > -infinity() ? order_of(x) : 0u, i);
        }
    }
};

// Of the scores first ... last (no NaN; -infinity: never) the `wanted` best ones, of equals the lower page, ascending to `pages`; -> how
// many. kept: how many of `old_count` pages, which lie at `old` until then, are among them. Which score decides is found by histograms of
// BINS bins, each of one bin of the one before, until few scores are left to compare with each other.
__device__ __forceinline__ int top_pages(Choosing& shared, const float* scores, int first, int last, int wanted, int* pages,
                                         const int* old, int old_count, int& kept)
{
    const int count = last - first, turns = (count + SELECT_THREADS - 1) / SELECT_THREADS, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float own[OWN];
#pragma unroll
    for (int k = 0; k < OWN; k++) {
        const int i = k * SELECT_THREADS + threadIdx.x;
        own[k] = i < count ? load_shared_by_all(scores + first + i) : -infinity();
    }
    if (threadIdx.x == 0) shared.low = ~0u, shared.high = shared.possible = shared.listed = 0;
    __syncthreads();
    const Scores all_scores{own, scores + first, count, turns};
    u32 low = ~0u, high = 0, possible = 0;
    all_scores.each([&](u32 order, int) {
        if (order) low = min(low, order), high = max(high, order), possible++;
    });
    low = __reduce_min_sync(FULL_WARP, low), high = __reduce_max_sync(FULL_WARP, high), possible = __reduce_add_sync(FULL_WARP, possible);
    if (lane == 0) atomicMin(&shared.low, low), atomicMax(&shared.high, high), atomicAdd(&shared.possible, possible);
    __syncthreads();
    low = shared.low, high = shared.high;
    wanted = min(wanted, (int)shared.possible);
    u32 left = wanted;          // to be found in low ... high; all above are taken
    bool among = left < shared.possible, equal = false;
    if (!among) low = high = left = 0;  // all above 0
    while (among) {
        const int shift = max(0, 32 - __clz(high - low) - BIN_BITS);
        for (int b = threadIdx.x; b < BINS; b += SELECT_THREADS) shared.bins[b] = 0;
        __syncthreads();
        all_scores.each([&](u32 order, int) {
            if (order >= low && order <= high) atomicAdd(&shared.bins[order - low >> shift], 1u);
        });
        __syncthreads();
        u32 mine[BINS / SELECT_THREADS], sum = 0, all;
#pragma unroll
        for (int b = 0; b < BINS / SELECT_THREADS; b++)
            mine[b] = shared.bins[BINS - 1 - (threadIdx.x * (BINS / SELECT_THREADS) + b)], sum += mine[b];
        u32 above = sum_before(shared, sum, all);
#pragma unroll
        for (int b = 0; b < BINS / SELECT_THREADS; b++) {
            if (above < left && left <= above + mine[b])
                shared.bin = BINS - 1 - (threadIdx.x * (BINS / SELECT_THREADS) + b), shared.above = above, shared.within = mine[b];
            above += mine[b];
        }
        __syncthreads();
        left -= shared.above, low += shared.bin << shift, high = min(high, low + (1u << shift) - 1);
        equal = shift == 0;
        among = shared.within > LISTED && !equal && shared.within != left;
        if (shared.within == left) high = low - 1, left = 0;  // all of it
        __syncthreads();
    }
    all_scores.each([&](u32 order, int i) {
        const u32 word = __ballot_sync(FULL_WARP, order > high);
        if (lane == 0 && i < count) shared.words[i / 32] = word;
        if (left && !equal && order >= low && order <= high) {
            const u32 place = atomicAdd(&shared.listed, 1u);
            shared.orders[place] = order, shared.places[place] = i;
        }
    });
    __syncthreads();
    if (left && !equal) {
        const int listed = shared.listed;
        for (int e = threadIdx.x; e < listed; e += SELECT_THREADS) {
            const u32 order = shared.orders[e];
            const int place = shared.places[e];
            u32 better = 0;
            for (int o = 0; o < listed; o++) better += shared.orders[o] > order || (shared.orders[o] == order && shared.places[o] < place);
            if (better < left) atomicOr(&shared.words[place / 32], 1u << place % 32);
        }
    } else if (left && warp == 0) {  // of equal scores the first
        for (int i = lane; i < (count + 31) / 32 * 32 && left; i += 32) {
            const float x = i < count ? load_shared_by_all(scores + first + i) : -infinity();
            u32 word = __ballot_sync(FULL_WARP, x > -infinity() && order_of(x) == low);
            while (__popc(word) > left) word &= ~(0x80000000u >> __clz(word));
            left -= __popc(word);
            if (lane == 0) shared.words[i / 32] |= word;
        }
    }
    __syncthreads();
    u32 found = 0, all;
    for (int i = threadIdx.x; i < old_count; i += SELECT_THREADS) {
        const int page = old[i] - first;
        found += page >= 0 && page < count && shared.words[page / 32] >> page % 32 & 1;
    }
    sum_before(shared, found, all);
    kept = all;
    const int words = (count + 31) / 32, own_words = (words + SELECT_THREADS - 1) / SELECT_THREADS;
    u32 bits = 0;
    for (int w = threadIdx.x * own_words; w < min(words, (int)(threadIdx.x + 1) * own_words); w++) bits += __popc(shared.words[w]);
    u32 to = sum_before(shared, bits, all);
    for (int w = threadIdx.x * own_words; w < min(words, (int)(threadIdx.x + 1) * own_words); w++)
        for (u32 word = shared.words[w]; word; word &= word - 1) pages[to++] = first + 32 * w + __ffs(word) - 1;
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
            for (int page = range.y + threadIdx.x; page < total; page += SELECT_THREADS)
                row[HEADER + range.x + found + page - range.y] = page;
            reads = range.x + found + total - range.y;
            if (threadIdx.x == 0) {
                int next = 1;
                if (reuse > 0 && follows)
                    next = (float)kept / (float)max(found, 1) >= reuse ? min(2 * interval, LONGEST) : max(interval / 2, 1);
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
