// The best of a KV head's pages, found by one block from scores that other blocks have written. Of few pages the best ones are those that
// reach the last of as many groups' largest scores: usually not many more than are wanted, which are compared with each other. Of others
// scores are copied to shared memory; one histogram of them, linear between the least and the largest, nearly always leaves few in the bin
// that decides. Loops are not unrolled: code that runs once is fetched more slowly than it runs.
#pragma once
#include "selection.cuh"

#define BEST_BITS 9
#define BEST_BINS (1 << BEST_BITS)
#define MOST_CHOSEN_FROM 8192  // pages

#define MOST_COMPARED 320       // scores, with each other: a multiple of 4
#define AT_ONCE 16             // scores of a thread

struct alignas(16) Best {
    u32 bins[BEST_BINS], words[MOST_CHOSEN_FROM / 32];  // words: a bit a page, whether it is chosen
    float values[MOST_COMPARED];
    int places[MOST_COMPARED];
    u32 low, high, possible, listed, kept;
    float bound;

    // By all threads; a barrier is to follow.
    __device__ __forceinline__ void clear()
    {
#pragma unroll 1
        for (int b = threadIdx.x; b < BEST_BINS; b += blockDim.x) bins[b] = 0;
#pragma unroll 1
        for (int w = threadIdx.x; w < MOST_CHOSEN_FROM / 32; w += blockDim.x) words[w] = 0;
#pragma unroll 1
        for (int i = threadIdx.x; i < MOST_COMPARED; i += blockDim.x) values[i] = -infinity();
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

// best_pages() by comparing those that may be among the best: -1 where they are too many.
template <int WARPS>
__device__ __forceinline__ int few_best_pages(Best& best, const float* scores, int count, int wanted, int first, int* pages)
{
    constexpr int THREADS = 32 * WARPS;
    if (count > AT_ONCE * THREADS || wanted > THREADS) return -1;
    float own[AT_ONCE], top = -infinity();
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) {
        const int i = k * THREADS + (int)threadIdx.x;
        own[k] = i < count ? load_shared_by_all(scores + i) : -infinity();
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++) top = fmaxf(top, own[k]);
    int groups = THREADS;  // twice as many as are wanted, and a warp has one at least
#pragma unroll 1
    for (; groups / 2 >= max(2 * wanted, WARPS); groups /= 2) top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, THREADS / groups));
    float* tops = reinterpret_cast<float*>(best.bins);
    const int each = THREADS / groups, group = threadIdx.x / each;
    if (threadIdx.x % each == 0) tops[group] = top;
    __syncthreads();
    if ((int)threadIdx.x < groups) {
        const float value = tops[threadIdx.x];
        int better = 0;
#pragma unroll 4
        for (int o = 0; o < groups; o += 4) {
            const float4 four = *reinterpret_cast<const float4*>(tops + o);
            better += (four.x > value) + (four.y > value) + (four.z > value) + (four.w > value);
        }
        // of equals several may, and write the same
        if (better < wanted) atomicMin(&best.low, order_of(value));
    }
    __syncthreads();
    const float bound = float_of(best.low);
#pragma unroll
    for (int k = 0; k < AT_ONCE; k++)
        if (own[k] >= bound && own[k] > -infinity()) {
            const u32 place = atomicAdd(&best.listed, 1u);
            if (place < MOST_COMPARED) best.values[place] = own[k], best.places[place] = k * THREADS + threadIdx.x;
        }
    int* chosen = reinterpret_cast<int*>(best.bins);  // tops are done with
#pragma unroll 1
    for (int i = threadIdx.x; i < MOST_COMPARED; i += THREADS) chosen[i] = MOST_CHOSEN_FROM;
    __syncthreads();
    const int listed = best.listed;
    if (listed > MOST_COMPARED) return -1;
#pragma unroll 1
    for (int e = threadIdx.x; e < listed; e += THREADS) {
        const float value = best.values[e];
        const int place = best.places[e];
        int better = 0;
#pragma unroll 1
        for (int o = 0; o < listed; o += 4) {  // behind them are values that are never better
            const float4 v = *reinterpret_cast<const float4*>(best.values + o);
            const int4 p = *reinterpret_cast<const int4*>(best.places + o);
            better += (v.x > value || v.x == value && p.x < place) + (v.y > value || v.y == value && p.y < place)
                + (v.z > value || v.z == value && p.z < place) + (v.w > value || v.w == value && p.w < place);
        }
        if (better < wanted) chosen[e] = place, atomicOr(&best.words[place / 32], 1u << place % 32);
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < listed; e += THREADS) {
        const int place = chosen[e];
        int before = 0;
#pragma unroll 1
        for (int o = 0; o < listed; o += 4) {
            const int4 p = *reinterpret_cast<const int4*>(chosen + o);
            before += (p.x < place) + (p.y < place) + (p.z < place) + (p.w < place);
        }
        if (place < MOST_CHOSEN_FROM) pages[before] = first + place;
    }
    return min(wanted, listed);
}

// Of `count` scores (no NaN; -infinity: never) at `scores`, which other blocks wrote, the `wanted` best ones, of equals the first; their
// places plus `first`, ascending, to `pages` in shared memory; -> how many. own: room for the scores in shared memory. All threads of a
// block, after clear() and a barrier; `pages` and `best.words` are there after the next barrier.
template <int WARPS>
__device__ __forceinline__ int best_pages(Best& best, float* own, const float* scores, int count, int wanted, int first, int* pages)
{
    constexpr int THREADS = 32 * WARPS, TOGETHER = 2048 / THREADS;
    const int few = few_best_pages<WARPS>(best, scores, count, wanted, first, pages);
    if (few >= 0) return few;
    __syncthreads();
    best.clear();
    __syncthreads();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, padded = (count + 31) / 32 * 32;
    u32 low = ~0u, high = 0, possible = 0;
#pragma unroll 1
    for (int from = threadIdx.x; from - lane < padded; from += TOGETHER * THREADS) {
        float x[TOGETHER];
#pragma unroll
        for (int k = 0; k < TOGETHER; k++)
            x[k] = from + k * THREADS < count ? load_shared_by_all(scores + from + k * THREADS) : -infinity();
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            const u32 order = order_of(x[k]);
            if (x[k] > -infinity()) low = min(low, order), high = max(high, order), possible++;
            if (from + k * THREADS < padded) own[from + k * THREADS] = x[k];
        }
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
            best.values[place] = own[i], best.places[place] = i;
        }
    }
    __syncthreads();
    if (left && !equal) {
        const int listed = best.listed;
#pragma unroll 1
        for (int e = threadIdx.x; e < listed; e += THREADS) {
            const float value = best.values[e];
            const int place = best.places[e];
            u32 better = 0;
#pragma unroll 1
            for (int o = 0; o < listed; o++) better += best.values[o] > value || (best.values[o] == value && best.places[o] < place);
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
