// The best of many scores, by one block of SELECT_THREADS threads, as an ascending list of their places.
#pragma once
#include "attention_merge.cuh"

#define SELECT_THREADS 256
#define OWN 16         // scores that a thread holds in registers while it chooses; beyond 4,096 pages it reads them again
#define MOST_CANDIDATES 32768
#define BIN_BITS 11
#define BINS (1 << BIN_BITS)
#define LISTED 64      // scores that are compared with each other

// Ascends with the float.
__device__ __forceinline__ u32 order_of(float x)
{
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Choosing {
    u32 bins[BINS], words[MOST_CANDIDATES / 32], orders[LISTED], sums[SELECT_THREADS / 32];
    int places[LISTED];
    u32 low, high, possible, bin, above, within, listed, kept;
};

// The float that order_of() is of.
__device__ __forceinline__ float score_of(u32 order)
{
    return __uint_as_float(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}

// Which of BINS bins of equal width from `low` on a score of order `order` falls into: higher scores into the same or a higher one.
__device__ __forceinline__ int bin_of(u32 order, float low, float scale)
{
    return min((int)((score_of(order) - low) * scale), BINS - 1);
}

// Sum over the threads before this one, and over all. A barrier before and after.
__device__ __forceinline__ u32 sum_before(Choosing& shared, u32 x, u32& all)
{
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 until = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_up_sync(FULL_WARP, until, step);
        if (lane >= step) until += other;
    }
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

// The bin in which `left` scores from the highest bin on are passed: into shared.bin, with how many lie above it and in it. By all threads,
// with a barrier before and after.
__device__ __forceinline__ void find_bin(Choosing& shared, u32 left)
{
    constexpr int EACH = BINS / SELECT_THREADS;
    u32 mine[EACH], sum = 0, all;
    __syncthreads();
#pragma unroll
    for (int b = 0; b < EACH; b++) mine[b] = shared.bins[BINS - 1 - (threadIdx.x * EACH + b)], sum += mine[b];
    u32 above = sum_before(shared, sum, all);
#pragma unroll
    for (int b = 0; b < EACH; b++) {
        if (above < left && left <= above + mine[b])
            shared.bin = BINS - 1 - (threadIdx.x * EACH + b), shared.above = above, shared.within = mine[b];
        above += mine[b];
    }
    __syncthreads();
}

// Of the scores first ... last (no NaN; -infinity: never) the `wanted` best ones, of equals the lower page, ascending to `pages`; -> how
// many. kept: how many of `old_count` pages, which lie at `old` until then, are among them. Which score decides is found by a histogram of
// BINS bins of equal width, whose deciding one mostly holds few scores, which are compared with each other; where it holds many, by
// histograms of bits, each of one bin of the one before.
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
    if (threadIdx.x == 0) shared.low = ~0u, shared.high = shared.possible = shared.listed = shared.kept = 0;
    for (int b = threadIdx.x; b < BINS; b += SELECT_THREADS) shared.bins[b] = 0;
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
    u32 left = wanted;                               // to be found among those that are not decided; all above are taken
    bool among = left < shared.possible, equal = false;
    const float least = score_of(low), width = score_of(high) - least;
    const float scale = width > 0 && width < 1e30f ? BINS / width : 0;
    bool even = among && scale > 0;                  // `bin` decides, else low and high
    int bin = 0;
    if (even) {
        all_scores.each([&](u32 order, int) {
            if (order) atomicAdd(&shared.bins[bin_of(order, least, scale)], 1u);
        });
        find_bin(shared, left);
        left -= shared.above, bin = shared.bin;
        among = shared.within > LISTED && shared.within != left;
        if (shared.within == left) bin--, left = 0;  // all of it
        if (among) {
            if (threadIdx.x == 0) shared.low = ~0u, shared.high = 0;
            __syncthreads();
            low = ~0u, high = 0;
            all_scores.each([&](u32 order, int) {
                if (order && bin_of(order, least, scale) == bin) low = min(low, order), high = max(high, order);
            });
            low = __reduce_min_sync(FULL_WARP, low), high = __reduce_max_sync(FULL_WARP, high);
            if (lane == 0) atomicMin(&shared.low, low), atomicMax(&shared.high, high);
            __syncthreads();
            low = shared.low, high = shared.high, even = false;
        }
    } else if (!among) {
        low = high = left = 0;  // all above 0
    }
    while (among) {
        const int shift = max(0, 32 - __clz(high - low) - BIN_BITS);
        for (int b = threadIdx.x; b < BINS; b += SELECT_THREADS) shared.bins[b] = 0;
        __syncthreads();
        all_scores.each([&](u32 order, int) {
            if (order >= low && order <= high) atomicAdd(&shared.bins[order - low >> shift], 1u);
        });
        find_bin(shared, left);
        left -= shared.above, low += shared.bin << shift, high = min(high, low + (1u << shift) - 1);
        equal = shift == 0;
        among = shared.within > LISTED && !equal && shared.within != left;
        if (shared.within == left) high = low - 1, left = 0;  // all of it
        __syncthreads();
    }
    all_scores.each([&](u32 order, int i) {
        const int own_bin = even && order ? bin_of(order, least, scale) : -1;
        const u32 word = __ballot_sync(FULL_WARP, even ? order && own_bin > bin : order > high);
        if (lane == 0 && i < count) shared.words[i / 32] = word;
        if (left && !equal && (even ? order && own_bin == bin : order >= low && order <= high)) {
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
    if (old_count) {
        found = __reduce_add_sync(FULL_WARP, found);
        if (lane == 0) atomicAdd(&shared.kept, found);
    }
    const int words = (count + 31) / 32, own_words = (words + SELECT_THREADS - 1) / SELECT_THREADS, from = threadIdx.x * own_words;
    u32 bits = 0;
    for (int w = from; w < min(words, from + own_words); w++) bits += __popc(shared.words[w]);
    u32 to = sum_before(shared, bits, all);  // reads of `old` end before it
    kept = shared.kept;
    for (int w = from; w < min(words, from + own_words); w++) shared.bins[w] = to, to += __popc(shared.words[w]);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += SELECT_THREADS) {
        const u32 word = shared.words[i / 32];
        if (word >> lane & 1) pages[shared.bins[i / 32] + __popc(word & (1u << lane) - 1)] = first + i;
    }
    return wanted;
}
