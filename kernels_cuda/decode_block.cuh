// What a block of decode keeps in shared memory, and how q and the newest token come there.
#pragma once
#include "attention_decode.cuh"
#include "exchange.cuh"

#define SIDES 32  // of pages, whose places a warp knows in advance
// Of a warp, behind Shared.
template <int KIND, int D> __device__ __forceinline__ int warp_bytes(int stages)
{
    return SIDES * (int)sizeof(Place) + stages * side_bytes<KIND, D>();
}

template <int D, int WARPS> struct alignas(128) Shared {  // what lies behind it begins at a row of the banks
    static constexpr int ENDS = WARPS < 8 ? WARPS : 8;  // pages at the ends of what is read: the first one and the last ones
    float q[HEADS][D];
    uint4 queries[D / 32][32];  // what each lane multiplies with 32 channels, the same for all warps
    float norms[HEADS], tops[WARPS][HEADS], sums[WARPS][HEADS], base[WARPS][HEADS][D / 32];
    float key[D], value[D], newest[HEADS];  // of the newest token; its scores
    i64 pools[POOLS * FIELDS];
    const int *table, *list;  // of pages, and of those that are read: null where all from `first` on are
    int first, end, head, row, used, range, low, slots, begin, stages, alone;  // what registers need not hold all the time
    int count, apart;  // pages that are read; whether those at both ends have another block if they are halves
    u64* told;         // the gang's words (exchange.cuh); null: its blocks do not wait for each other
    u32 *turn_at, turn;
    alignas(16) float scores[WARPS][HEADS * SCORE_STRIDE];

    // Thread 0's, to be kept in `turn` once other loads are under way.
    __device__ __forceinline__ u32 take_turn() const { return threadIdx.x == 0 && told ? next_turn(turn_at) : 0; }
    __device__ __forceinline__ bool at_an_end(int page) const { return page == 0 || page > count - ENDS; }
};

static_assert(sizeof(Shared<128, 8>) == 19072, "cached_attention.py, block_bytes");

// q of the group: rotated, times scale * log2 e, to shared memory: as floats, and for each lane as halves of q over its head's largest.
template <int D, int WARPS> struct Prepared {
    static constexpr int EACH = WARPS < HEADS ? HEADS / WARPS : 1;  // heads of a warp, of the first ones
    Turn turns[EACH][D / 32];

    __device__ __forceinline__ void load_angles(const Call& call, i64 position)
    {
        if ((int)threadIdx.x / 32 >= min(HEADS, call.group())) return;
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            turns[0][i].load_angle(call, position, threadIdx.x % 32 + 32 * i);
            for (int n = 1; n < EACH; n++) turns[n][i] = turns[0][i];
        }
    }
    __device__ __forceinline__ void load(const Call& call, int head, int row)  // when the kernel that writes q has ended
    {
        const int group = call.group(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const float* x = at<float>(call.q) + row * call.q_stride + head * group * D;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            if (warp + n * WARPS >= group) break;
#pragma unroll
            for (int i = 0; i < D / 32; i++) turns[n][i].load_channel(call, x + (warp + n * WARPS) * D, lane + 32 * i);
        }
    }
    // A barrier is to follow before `queries` are read.
    __device__ __forceinline__ void store(const Call& call, Shared<D, WARPS>& shared) const
    {
        const int group = call.group(), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
#pragma unroll
        for (int n = 0; n < EACH; n++) {
            const int h = warp + n * WARPS;
            if (h >= HEADS) break;
            float top = 0;
            if (h >= group) {
                for (int i = 0; i < D / 32; i++) shared.q[h][lane + 32 * i] = 0;
            } else {
#pragma unroll
                for (int i = 0; i < D / 32; i++) {
                    const float y = turns[n][i].value() * call.scale() * LOG2E;
                    shared.q[h][lane + 32 * i] = y, top = fmaxf(top, fabsf(y));
                }
            }
            top = fmaxf(warp_max(top), 1e-30f);
            if (lane == 0) shared.norms[h] = top;
        }
        __syncthreads();
        const float inverse = 1 / shared.norms[g];
        for (int block = warp; block < D / 32; block += WARPS) {
            const float4 a = *reinterpret_cast<const float4*>(&shared.q[g][32 * block + 8 * j]);
            const float4 b = *reinterpret_cast<const float4*>(&shared.q[g][32 * block + 8 * j + 4]);
            shared.queries[block][lane] = make_uint4(
                floats_to_halves(a.x * inverse, a.z * inverse), floats_to_halves(a.y * inverse, a.w * inverse),
                floats_to_halves(b.x * inverse, b.z * inverse), floats_to_halves(b.y * inverse, b.w * inverse));
        }
    }
};

// The newest token, in halves as its page will hold it: a channel for each of the first D threads. store() writes it into its page; its key
// and value are in shared memory after the next barrier.
template <int D, int WARPS> struct Newest {
    Turn turn;
    float value;

    __device__ __forceinline__ void load(const Call& call, int head, int row, i64 position)
    {
        if (threadIdx.x >= D) return;
        turn.load(call, at<float>(call.k) + row * call.k_stride + head * D, position, threadIdx.x);
        value = at<float>(call.v)[row * call.v_stride + head * D + threadIdx.x];
    }
    __device__ __forceinline__ void store(Shared<D, WARPS>& shared) const
    {
        const int c = threadIdx.x, slot = shared.slots;
        if (c >= D) return;
        const Page page(shared.pools, shared.table[slot / PAGE]);
        const u16 key = float_to_half(turn.value()), half = float_to_half(value);
        shared.key[c] = half_to_float(key), shared.value[c] = half_to_float(half);
        at<u16>(page.place(K))[c * PAGE + slot % PAGE] = key, at<u16>(page.place(V))[slot % PAGE * D + c] = half;
    }
    static __device__ __forceinline__ float score(const Shared<D, WARPS>& shared, int h)  // by a warp
    {
        float x = 0;
        for (int c = threadIdx.x % 32; c < D; c += 32) x += shared.q[h][c] * shared.key[c];
        return warp_sum(x);
    }
};
