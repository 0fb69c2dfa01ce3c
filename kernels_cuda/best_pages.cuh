// The best of a KV head's pages, found by one block from scores that all of the gang tell (exchange.cuh). Few more than are wanted reach
// the largest scores of as many threads; of these every warp finds the last that is wanted by halving (comparing each with all others took
// longer). Of more scores are copied to shared memory; one histogram of them, linear between the least and the largest, nearly always
// leaves few in the bin that decides. Loops are not unrolled: code that runs once is fetched more slowly than it runs.
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
    u32 before = sum_until(sum) - sum;
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

// Raises `bound`, which `reach` of a warp's numbers reach (COUNT of each lane), while `wanted` of them still do, until they are at most
// `more` too many: by that many halvings of what is above it at most.
template <int COUNT>
__device__ __forceinline__ void raise_bound(u32& bound, int& reach, const u32 (&x)[COUNT], int wanted, int more, int halvings)
{
    u32 high = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) high = max(high, x[i]);
    high = __reduce_max_sync(FULL_WARP, high) + 1;  // too few
#pragma unroll 1
    for (int n = 0; n < halvings && reach > wanted + more && high - bound > 1; n++) {
        const u32 middle = bound + (high - bound) / 2;
        int some[2] = {};
#pragma unroll
        for (int i = 0; i < COUNT; i++) some[i % 2] += x[i] >= middle;
        const int own = __reduce_add_sync(FULL_WARP, some[0] + some[1]);
        if (own >= wanted) bound = middle, reach = own;
        else high = middle;
    }
}

// best_pages() of not too many scores, with not too many wanted: else -1.
template <int WARPS>
__device__ __forceinline__ int few_best_pages(Best& best, const u64* scores, u32 turn, int count, int wanted, int first, int* pages)
{
    constexpr int THREADS = 32 * WARPS, LEFT = MOST_LEFT / 32, WORDS = AT_ONCE * WARPS / 32;
    constexpr u32 NEVER = 0x007fffff;  // order_of(-infinity)
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (count > AT_ONCE * THREADS || wanted > THREADS * 5 / 8) return -1;  // of more than that too many would be left
    u32 own[AT_ONCE], top = 0;
    bool there;
    do {
        there = true;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            u64 word = 0;
            if (k * THREADS + (int)threadIdx.x < count) word = hear(scores + k * THREADS + threadIdx.x), there &= turn_of(word) == turn;
            own[k] = k * THREADS + (int)threadIdx.x < count ? order_of(told_by(word)) : 0;
        }
    } while (!there);
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) top = max(top, own[k]);
    best.bins[threadIdx.x] = top;
    __syncthreads();
    u32 bound = ~0u;
    {
        u32 tops[WARPS];
        int reach = THREADS;
#pragma unroll
        for (int i = 0; i < WARPS; i++) tops[i] = best.bins[32 * i + lane], bound = min(bound, tops[i]);
        bound = __reduce_min_sync(FULL_WARP, bound);
        raise_bound(bound, reach, tops, wanted, wanted / 8, 16);
        bound = max(bound, NEVER + 1);
    }
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
    const int listed = best.listed;
    if (listed > MOST_LEFT) return -1;
    wanted = min(wanted, listed);
    {
        u32 left[LEFT];
#pragma unroll
        for (int i = 0; i < LEFT; i++) left[i] = 32 * i + lane < listed ? best.orders[32 * i + lane] : 0;
        int reach = listed;
        raise_bound(bound, reach, left, wanted, 0, 32);
        int last = MOST_SCORES;
        if (reach > wanted) {  // of equal ones the first are taken
            u32 numbers[LEFT], number = 1;
#pragma unroll
            for (int i = 0; i < LEFT; i++) {
                const bool equal = left[i] == bound;
                numbers[i] = left[i] > bound ? MOST_SCORES + 1 : equal ? MOST_SCORES - best.places[32 * i + lane] : 0;
            }
            raise_bound(number, reach, numbers, wanted, 0, 32);
            last = MOST_SCORES - number;
        }
#pragma unroll 1
        for (int e = threadIdx.x; e < listed; e += THREADS) {
            const u32 order = best.orders[e];
            const int place = best.places[e];
            const bool taken = order > bound || (order == bound && place <= last);
            if (taken) atomicOr(&best.words[place / 32], 1u << place % 32);
        }
    }
    __syncthreads();
    u32 words[WORDS], sum = 0;  // of each lane, in every warp; a few lanes write them down
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = best.words[WORDS * lane + i], sum += __popc(words[i]);
    u32 place = sum_until(sum) - sum;
#pragma unroll
    for (int i = 0; i < WORDS && lane * WARPS / 32 == warp; i++)
#pragma unroll 1
        for (u32 word = words[i]; word; word &= word - 1) pages[place++] = first + 32 * (WORDS * lane + i) + __ffs(word) - 1;
    return wanted;
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
