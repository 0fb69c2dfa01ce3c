// The best of a KV head's pages, found by one block from scores that all of the gang tell (exchange.cuh). What reaches the largest scores
// of as many pairs of threads as pages are wanted is little more than that: each of these is compared with all others. Of more scores are
// copied to shared memory; one histogram of them, linear between the least and the largest, nearly always leaves few in the bin that
// decides.
#pragma once
#include "exchange.cuh"
#include "selection.cuh"

#define BEST_BITS 9
#define BEST_BINS (1 << BEST_BITS)

#define MOST_LEFT 320  // scores: a multiple of 32
#define AT_ONCE 16     // scores of a thread

struct alignas(16) Best {
    u32 bins[BEST_BINS], words[MOST_SCORES / 32];  // words: a bit a page, whether it is chosen
    u32 orders[MOST_LEFT];  // of scores
    int places[MOST_LEFT];
    u32 low, high, possible, listed, kept;

    // By all threads; a barrier is to follow.
    __device__ __forceinline__ void clear()
    {
#pragma unroll 1
        for (int b = threadIdx.x; b < BEST_BINS; b += blockDim.x) bins[b] = 0;
#pragma unroll 1
        for (int w = threadIdx.x; w < MOST_SCORES / 32; w += blockDim.x) words[w] = 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < MOST_LEFT; i += blockDim.x) orders[i] = 0;
        if (threadIdx.x == 0) low = ~0u, high = possible = listed = kept = 0;
    }
    __device__ __forceinline__ bool has(int place) const { return words[place / 32] >> place % 32 & 1; }
};

__device__ __forceinline__ float float_of(u32 order) { return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order); }

// Where a score stands among `bins` between low and high.
struct Ranks {
    float bottom, factor;  // linear bins, of all scores; factor 0: of orders low ... high
    u32 low, high;
    int shift;

    __device__ __forceinline__ Ranks(u32 low, u32 high, bool linear) : low(low), high(high)
    {
        bottom = float_of(low), factor = linear ? BEST_BINS / (float_of(high) - bottom) : 0;
        if (!(factor < infinity())) factor = 0;
        shift = max(0, 32 - __clz(high - low) - BEST_BITS);
    }
    // -1: below, or never
    __device__ __forceinline__ int of(float x) const
    {
        if (!(x > -infinity())) return -1;
        if (factor > 0) return min(BEST_BINS - 1, (int)((x - bottom) * factor));
        const u32 order = order_of(x);
        return order < low ? -1 : order > high ? BEST_BINS : (int)(order - low >> shift);
    }
};

// The bin, counted from the last one, with which `left` scores are there; those in all later bins and in it. By a warp.
__device__ __forceinline__ int deciding_bin(const u32* bins, u32 left, u32& above, u32& within)
{
    constexpr int OWN_BINS = BEST_BINS / 32;
    const int lane = threadIdx.x % 32, first = BEST_BINS - OWN_BINS * (lane + 1);
    u32 mine[OWN_BINS], sum = 0;
#pragma unroll
    for (int b = 0; b < OWN_BINS; b += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(bins + first + b);
        mine[b] = four.x, mine[b + 1] = four.y, mine[b + 2] = four.z, mine[b + 3] = four.w;
        sum += four.x + four.y + four.z + four.w;
    }
    u32 until = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const u32 other = __shfl_up_sync(FULL_WARP, until, step);
        if (lane >= step) until += other;
    }
    u32 before = until - sum;
    int bin = -1;
#pragma unroll
    for (int b = OWN_BINS - 1; b >= 0; b--) {
        if (before < left && left <= before + mine[b]) bin = first + b, above = before, within = mine[b];
        before += mine[b];
    }
    const int owner = __ffs(__ballot_sync(FULL_WARP, bin >= 0)) - 1;
    above = __shfl_sync(FULL_WARP, above, owner), within = __shfl_sync(FULL_WARP, within, owner);
    return __shfl_sync(FULL_WARP, bin, owner);
}

// How many of `count` numbers in shared memory, a multiple of 4, are greater than x, and how many equal it.
__device__ __forceinline__ int2 rank_of(u32 x, const u32* numbers, int count)
{
    int greater = 0, equal = 0;
#pragma unroll 4
    for (int i = 0; i < count; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(numbers + i);
        greater += (four.x > x) + (four.y > x) + (four.z > x) + (four.w > x);
        equal += (four.x == x) + (four.y == x) + (four.z == x) + (four.w == x);
    }
    return make_int2(greater, equal);
}

// best_pages() of not too many scores, with not too many wanted: else -1.
template <int WARPS>
__device__ __forceinline__ int few_best_pages(Best& best, const u64* scores, u32 turn, int count, int wanted, int first, int* pages)
{
    constexpr int THREADS = 32 * WARPS;
    constexpr u32 NEVER = 0x007fffff;  // order_of(-infinity)
    if (count > AT_ONCE * THREADS || wanted > THREADS) return -1;
    u32 own[AT_ONCE], top = 0;
    {
        u64 words[AT_ONCE];
        bool there;
        do {
            there = true;  // all loads are under way before any is looked at
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                if (k * THREADS + (int)threadIdx.x < count) words[k] = hear(scores + k * THREADS + threadIdx.x);
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
                if (k * THREADS + (int)threadIdx.x < count) there = there && turn_of(words[k]) == turn;
        } while (!there);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            own[k] = k * THREADS + (int)threadIdx.x < count ? order_of(told_by(words[k])) : 0;
            top = max(top, own[k]);
        }
    }
    u32* const tops = best.bins;
    const int each = wanted > THREADS / 2 ? 1 : 2;  // threads
    if (each == 2) top = max(top, __shfl_xor_sync(FULL_WARP, top, 1));
    tops[threadIdx.x / each] = top;
    __syncthreads();
    if ((int)threadIdx.x < THREADS / each) {
        const int2 rank = rank_of(tops[threadIdx.x], tops, THREADS / each);
        if (rank.x < wanted && wanted <= rank.x + rank.y) best.low = tops[threadIdx.x];  // equal ones write the same
    }
    __syncthreads();
    const u32 bound = max(best.low, NEVER + 1);
    int mine = 0;
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) mine += own[k] >= bound;
    if (mine) {
        u32 place = atomicAdd(&best.listed, (u32)mine);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++)
            if (own[k] >= bound) {
                if (place < MOST_LEFT) best.orders[place] = own[k], best.places[place] = k * THREADS + threadIdx.x;
                place++;
            }
    }
    __syncthreads();
    const int listed = best.listed, padded = (listed + 3) / 4 * 4;
    if (listed > MOST_LEFT) return -1;
    u32* const taken = best.bins;  // their places; MOST_SCORES: not of the best
#pragma unroll 1
    for (int e = threadIdx.x; e < padded; e += THREADS) {
        const u32 order = best.orders[e], place = best.places[e];
        const int2 rank = rank_of(order, best.orders, padded);
        int better = rank.x;
        if (better < wanted && better + rank.y > wanted)  // of equal ones the first
            for (int o = 0; o < listed; o++) better += best.orders[o] == order && best.places[o] < place;
        const bool takes = e < listed && better < wanted;
        taken[e] = takes ? place : MOST_SCORES;
        if (takes) atomicOr(&best.words[place / 32], 1u << place % 32);
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < listed; e += THREADS) {
        const u32 place = taken[e];
        if (place < MOST_SCORES) pages[padded - 1 - rank_of(place, taken, padded).x] = first + place;  // without what is greater or none
    }
    return min(wanted, listed);
}

// Of `count` scores (no NaN; -infinity: never) that are told at `scores`, the `wanted` best ones, of equals the first; their
// places plus `first`, ascending, to `pages` in shared memory; -> how many. own: room for the scores in shared memory. All threads of a
// block, after clear() and a barrier; `pages` and `best.words` are there after the next barrier.
template <int WARPS>
__device__ __forceinline__ int best_pages(Best& best, float* own, const u64* scores, u32 turn, int count, int wanted, int first, int* pages)
{
    constexpr int THREADS = 32 * WARPS;
    const int few = few_best_pages<WARPS>(best, scores, turn, count, wanted, first, pages);
    if (few >= 0) return few;
    __syncthreads();
    best.clear();
    __syncthreads();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, padded = (count + 31) / 32 * 32;
    u32 low = ~0u, high = 0, possible = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < padded; i += THREADS) {
        u64 word = word_of(-infinity(), turn);
        if (i < count) do word = hear(scores + i); while (turn_of(word) != turn);
        own[i] = told_by(word);
        const u32 order = order_of(own[i]);
        if (own[i] > -infinity()) low = min(low, order), high = max(high, order), possible++;
    }
    low = __reduce_min_sync(FULL_WARP, low), high = __reduce_max_sync(FULL_WARP, high), possible = __reduce_add_sync(FULL_WARP, possible);
    if (lane == 0) atomicMin(&best.low, low), atomicMax(&best.high, high), atomicAdd(&best.possible, possible);
    __syncthreads();
    wanted = min(wanted, (int)best.possible);
    Ranks ranks(best.low, best.high, true);
    u32 left = wanted, within = 0;  // to be found in the bin that decides; in it
    int bin = -1;                   // all above it are taken
    bool whole = wanted == best.possible, equal = false;
    if (whole) left = 0;
#pragma unroll 1
    while (!whole) {
#pragma unroll 1
        for (int i = threadIdx.x; i < padded; i += THREADS) {
            const int b = ranks.of(own[i]);
            if (b >= 0 && b < BEST_BINS) atomicAdd(&best.bins[b], 1u);
        }
        __syncthreads();
        u32 above = 0;
        bin = deciding_bin(best.bins, left, above, within);
        left -= above;
        equal = ranks.factor == 0 && ranks.shift == 0;
        if (left == within || within <= LISTED || equal) break;
        __syncthreads();  // rare: too many for comparing; the same of the range that this bin has
        best.clear();
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < padded; i += THREADS)
            if (ranks.of(own[i]) == bin) atomicMin(&best.low, order_of(own[i])), atomicMax(&best.high, order_of(own[i]));
        __syncthreads();
        ranks = Ranks(best.low, best.high, false);
    }
    const bool all = !whole && left == within;
    if (all) bin--, left = 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < padded; i += THREADS) {
        const int b = ranks.of(own[i]);
        const u32 word = __ballot_sync(FULL_WARP, b > bin);
        if (lane == 0) best.words[i / 32] = word;
        if (left && !equal && b == bin) {
            const u32 place = atomicAdd(&best.listed, 1u);
            best.orders[place] = order_of(own[i]), best.places[place] = i;
        }
    }
    __syncthreads();
    if (left && !equal) {
        const int listed = best.listed;
#pragma unroll 1
        for (int e = threadIdx.x; e < listed; e += THREADS) {
            const u32 order = best.orders[e];
            const int place = best.places[e];
            u32 better = 0;
#pragma unroll 1
            for (int o = 0; o < listed; o++) better += best.orders[o] > order || (best.orders[o] == order && best.places[o] < place);
            if (better < left) atomicOr(&best.words[place / 32], 1u << place % 32);
        }
        __syncthreads();
    } else if (left) {
#pragma unroll 1
        for (int i = lane; warp == 0 && i < padded && left; i += 32) {  // of equal scores the first
            u32 word = __ballot_sync(FULL_WARP, ranks.of(own[i]) == bin);
#pragma unroll 1
            while (__popc(word) > left) word &= ~(0x80000000u >> __clz(word));
            left -= __popc(word);
            if (lane == 0) best.words[i / 32] |= word;
        }
        __syncthreads();
    }
    // each warp a range of the words, behind what the others before it have
    const int words = padded / 32, each = (words + WARPS - 1) / WARPS, begin = min(warp * each, words), end = min(begin + each, words);
    u32 before = 0;
#pragma unroll 1
    for (int w = lane; w < begin; w += 32) before += __popc(best.words[w]);
    before = __reduce_add_sync(FULL_WARP, before);
#pragma unroll 1
    for (int w = begin; w < end; w++) {
        const u32 word = best.words[w];
        if (word >> lane & 1) pages[before + __popc(word & (1u << lane) - 1)] = first + 32 * w + lane;
        before += __popc(word);
    }
    return wanted;
}
