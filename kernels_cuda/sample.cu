// One token from one row of logits, without sorting the vocabulary.
//
// sample_copy, sample_penalise, sample_best: the logits after the repeat penalty (NaN as -inf), and the largest, by many blocks.
// sample_choose: one block. Every filter is the same question, which token makes the sum over the more likely ones pass a target: with
// weights of 1 (top-k), of p (top-p), of p at the temperature (the sampled token). It is answered by histograms of BINS bins, each over
// the elements of the bin before, until a bin holds one token. Weights are fixed-point, so that their sums do not depend on the order.
#include "common.cuh"

#define BINS 4096
#define THREADS 1024
#define FINE 64.0f         // bins to one unit of logits, at the first level
#define ONE (1ull << 40)   // weight 1

enum { TEMPERATURE, TOP_P, MIN_P, REPEAT_PENALTY, UNIFORM, TOP_K };  // in `settings`, float64

struct Places {            // in the workspace
    u64* best;
    float* logits;
    u32 *kept_first, *kept_second, *some_even, *some_odd;  // lists of tokens
};

__device__ __forceinline__ Places places(u8* workspace, int vocab)
{
    float* logits = (float*)(workspace + 64);
    u32* lists = (u32*)(logits + vocab);
    return {(u64*)workspace, logits, lists, lists + vocab, lists + 2 * (i64)vocab, lists + 3 * (i64)vocab};
}

__device__ __forceinline__ float number(float x) { return x == x ? x : -infinity(); }

// ascends from the most likely token on: by falling logit (0 and -0 are equal), then by token
__device__ __forceinline__ u64 rank_key(float logit, u32 token)
{
    const u32 bits = __float_as_uint(logit + 0.0f), ordered = bits & 0x80000000 ? ~bits : bits | 0x80000000;
    return (u64)~ordered << 32 | token;
}

KERNEL sample_copy(const float* given, u8* workspace, int vocab)
{
    release_next();
    wait_previous();
    const Places at = places(workspace, vocab);
    if (blockIdx.x == 0 && threadIdx.x == 0) *at.best = ~0ull;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab; i += gridDim.x * blockDim.x) at.logits[i] = number(given[i]);
}

// a token that was seen twice is written twice, with one value
KERNEL sample_penalise(const float* given, const i64* history, const i64* state, int history_at, const double* settings, u8* workspace,
                       int vocab)
{
    release_next();
    wait_previous();
    const Places at = places(workspace, vocab);
    const float penalty = (float)settings[REPEAT_PENALTY];
    for (i64 i = blockIdx.x * blockDim.x + threadIdx.x; i < state[history_at]; i += gridDim.x * blockDim.x) {
        const float x = given[history[i]];
        at.logits[history[i]] = number(x > 0 ? x / penalty : x * penalty);
    }
}

KERNEL sample_best(u8* workspace, int vocab)
{
    release_next();
    wait_previous();
    const Places at = places(workspace, vocab);
    u64 best = ~0ull;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vocab; i += gridDim.x * blockDim.x) best = min(best, rank_key(at.logits[i], i));
    for (int step = 16; step; step >>= 1) best = min(best, __shfl_xor_sync(FULL_WARP, best, step));
    if (threadIdx.x % 32 == 0) atomicMin(at.best, best);
}

struct Weights {
    float top, scale;      // exp((logit - top) * scale); scale 0: 1 each
    __device__ __forceinline__ float of(float logit) const { return logit == top ? 1.0f : expf((logit - top) * scale); }
    __device__ __forceinline__ u64 fixed(float logit) const { return scale == 0 ? 1 : (u64)(of(logit) * (float)ONE); }
};

struct Shared {
    u32 low[BINS], high[BINS];
    u64 warps[THREADS / 32];
    u64 before, least, most;
    u32 bin, count;
};

// the bin in which the running sum passes target(total): sets bin and the sum before it
template <class Target> __device__ __forceinline__ void find_bin(Shared& s, bool total_known, u64& target, Target wanted)
{
    constexpr int EACH = BINS / THREADS;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 own[EACH], sum = 0;
    for (int i = 0; i < EACH; i++) {
        own[i] = (u64)s.high[threadIdx.x * EACH + i] << 32 | s.low[threadIdx.x * EACH + i];
        sum += own[i];
    }
    u64 running = sum;
    for (int step = 1; step < 32; step <<= 1) {
        const u64 other = __shfl_up_sync(FULL_WARP, running, step);
        if (lane >= step) running += other;
    }
    if (lane == 31) s.warps[warp] = running;
    __syncthreads();
    u64 total = 0;
    for (int w = 0; w < THREADS / 32; w++) {
        if (w < warp) running += s.warps[w];
        total += s.warps[w];
    }
    if (!total_known) target = wanted(total);
    u64 before = running - sum;
    for (int i = 0; i < EACH; i++) {
        if (before <= target && target < before + own[i]) {
            s.bin = threadIdx.x * EACH + i;
            s.before = before;
        }
        before += own[i];
    }
    __syncthreads();
}

// f(token, its logit) for all tokens of `list` (null: the first n). Loads of BATCH rounds are under way at once: one block alone has
// little to wait with.
template <class F> __device__ __forceinline__ void for_each(const Places& at, const u32* list, int n, F f)
{
    constexpr int BATCH = 8;
    for (int first = threadIdx.x; first < n; first += BATCH * THREADS) {
        u32 token[BATCH];
        float logit[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; i++) token[i] = list && first + i * THREADS < n ? list[first + i * THREADS] : first + i * THREADS;
#pragma unroll
        for (int i = 0; i < BATCH; i++) logit[i] = first + i * THREADS < n ? at.logits[token[i]] : 0.0f;
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (first + i * THREADS < n) f(token[i], logit[i]);
    }
}

// rank_key of the first token whose running sum passes target(total). list: n tokens, or null for all of them.
template <class Target>
__device__ u64 select(Shared& s, const Places& at, const u32* list, int n, const Weights& weights, Target wanted)
{
    u64 target = 0, least = 0;
    int shift = -1;        // of the first level: by the distance to the largest logit
    for (int level = 0;; level++) {
        const auto bin_of = [&](u32 token, float logit) -> u32 {
            if (shift >= 0) return (u32)(rank_key(logit, token) - least >> shift);
            const float distance = logit == weights.top ? 0.0f : (weights.top - logit) * FINE;
            return distance < BINS - 1 ? (u32)distance : BINS - 1;
        };
        for (int i = threadIdx.x; i < BINS; i += THREADS) s.low[i] = s.high[i] = 0;
        if (threadIdx.x == 0) s.count = 0, s.least = ~0ull, s.most = 0;
        __syncthreads();
        for_each(at, list, n, [&](u32 token, float logit) {
            const u64 weight = weights.fixed(logit);
            const u32 bin = bin_of(token, logit), old = atomicAdd(&s.low[bin], (u32)weight), carry = old + (u32)weight < old;
            if (weight >> 32 || carry) atomicAdd(&s.high[bin], (u32)(weight >> 32) + carry);
        });
        __syncthreads();
        find_bin(s, level > 0, target, wanted);
        target -= s.before;
        if (shift == 0) return least + s.bin;
        const u32 wanted_bin = s.bin;
        u32* to = level & 1 ? at.some_odd : at.some_even;
        u64 smallest = ~0ull, largest = 0;
        for_each(at, list, n, [&](u32 token, float logit) {
            if (bin_of(token, logit) == wanted_bin) {
                to[atomicAdd(&s.count, 1)] = token;
                const u64 key = rank_key(logit, token);
                smallest = min(smallest, key);
                largest = max(largest, key);
            }
        });
        if (smallest != ~0ull) atomicMin(&s.least, smallest), atomicMax(&s.most, largest);
        __syncthreads();
        list = to, n = s.count, least = s.least;
        shift = max(0, 64 - __clzll(s.most - least) - 12);
        if (n == 1) {
            __syncthreads();
            return least;
        }
        __syncthreads();
    }
}

// the tokens of `list` up to key `last` whose weight is at least `enough`, and the best one: into `to`; returns their number
__device__ int keep(Shared& s, const Places& at, const u32* list, int n, u64 last, const Weights& weights, float enough, u64 best, u32* to)
{
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    for_each(at, list, n, [&](u32 token, float logit) {
        const u64 key = rank_key(logit, token);
        if (key == best || key <= last && weights.of(logit) >= enough) to[atomicAdd(&s.count, 1)] = token;
    });
    __syncthreads();
    const int count = s.count;
    __syncthreads();
    return count;
}

KERNEL __launch_bounds__(THREADS) sample_choose(const double* settings, u8* workspace, int vocab, i64* chosen)
{
    __shared__ Shared s;
    release_next();
    wait_previous();
    const Places at = places(workspace, vocab);
    const u64 best = *at.best;
    if (settings[TEMPERATURE] <= 0) {
        if (threadIdx.x == 0) *chosen = (u32)best;
        return;
    }
    const Weights counts = {at.logits[(u32)best], 0}, plain = {counts.top, 1}, heated = {counts.top, (float)(1 / settings[TEMPERATURE])};
    const u32* list = nullptr;
    int n = vocab;
    const double top_k = settings[TOP_K], top_p = settings[TOP_P];
    if (0 < top_k && top_k < vocab) {
        const u64 last = select(s, at, list, n, counts, [&](u64) { return (u64)top_k - 1; });
        n = keep(s, at, list, n, last, plain, -1, best, at.kept_first);
        list = at.kept_first;
    }
    if (top_p < 1 || settings[MIN_P] > 0) {
        u64 last = ~0ull;
        if (top_p < 1)  // kept as long as the sum before is less than top_p of all: up to the first whose own sum reaches it
            last = select(s, at, list, n, plain, [&](u64 total) { return (u64)fmax(ceil(top_p * (double)total) - 1, 0.0); });
        n = keep(s, at, list, n, last, plain, (float)settings[MIN_P], best, at.kept_second);
        list = at.kept_second;
    }
    const u64 token = select(s, at, list, n, heated, [&](u64 total) { return min((u64)(settings[UNIFORM] * (double)total), total - 1); });
    if (threadIdx.x == 0) *chosen = (u32)token;
}
