// Decode attention: a block is one KV head of a sequence and one range of its pages, with all query heads of the group. Its warps take
// pages in turn, which come through rings in shared memory, keys and values in turn, while others are computed on. The newest token is in
// no page yet: a block of its own rotates it, attends to it and writes it. The last block of a KV head to end merges all of them, so that
// a step is one launch. Of few pages there is one range, whose block has the newest token as well and nothing to merge with.
//   grid    (kv_heads * (ranges + 1), sequences)    sequences with more than one row are left to the kernels of prefill
//   block   32 * WARPS threads
//   shared  Shared<D, WARPS>, then `stages` sides (side_bytes), 2 or 3, for each warp
#include "attention_decode.cuh"

template <int D, int WARPS> struct Shared {
    float q[HEADS][D];
    uint4 queries[D / 32][32];  // what each lane multiplies with 32 channels, the same for all warps
    float norms[HEADS], tops[WARPS][HEADS], sums[WARPS][HEADS], base[WARPS][HEADS][D / 32];
    float key[D], value[D], newest[HEADS];  // of the newest token; its scores
    i64 pools[POOLS * FIELDS];
    const int *table, *list;  // of pages, and of those that are read: null where all from `first` on are
    int first, end, head, row, used, range, ranges, low, slots, begin, stages, alone; // what registers need not hold all the time
    float scores[WARPS][HEADS * SCORE_STRIDE];
};

// q of the group: rotated, times scale * log2 e, to shared memory: as floats, and for each lane as halves of q over its head's largest.
template <int D, int WARPS> struct Prepared {
    Turn turns[HEADS / WARPS][D / 32];

    __device__ __forceinline__ void load(const Call& call, int head, int row, i64 position)
    {
        const int group = call.group(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const float* x = at<float>(call.q) + row * call.q_stride + head * group * D;
#pragma unroll
        for (int n = 0; n < HEADS / WARPS; n++)
#pragma unroll
            for (int i = 0; i < D / 32; i++) turns[n][i].load(call, x + min(warp + n * WARPS, group - 1) * D, position, lane + 32 * i);
    }
    __device__ __forceinline__ void store(const Call& call, Shared<D, WARPS>& shared) const
    {
        const int group = call.group(), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
#pragma unroll
        for (int n = 0; n < HEADS / WARPS; n++) {
            const int h = warp + n * WARPS;
            float top = 0;
#pragma unroll
            for (int i = 0; i < D / 32; i++) {
                const float y = h < group ? turns[n][i].value() * call.scale() * LOG2E : 0;
                shared.q[h][lane + 32 * i] = y, top = fmaxf(top, fabsf(y));
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
        __syncthreads();
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

// The newest token as if it were a range of its own.
template <int D, int WARPS>
__device__ __forceinline__ void attend_newest(const Call& call, Shared<D, WARPS>& shared, i64 position)
{
    Prepared<D, WARPS> prepared;
    Newest<D, WARPS> newest;
    prepared.load(call, shared.head, shared.row, position);
    newest.load(call, shared.head, shared.row, position);
    newest.store(shared);
    prepared.store(call, shared);
    for (int h = threadIdx.x / 32; h < call.group(); h += WARPS) {
        float* partial = partial_of(call, shared.ranges, blockIdx.y, shared.head, shared.used, h);
        for (int c = threadIdx.x % 32; c < D; c += 32) partial[c] = shared.value[c];
        const float x = Newest<D, WARPS>::score(shared, h);
        if (threadIdx.x % 32 == 0) partial[D] = x, partial[D + 1] = 1;
    }
}

// Results of the warps -> the range's partial result, or of the only range the output. out: [WARPS][HEADS][D].
template <int D, int WARPS>
__device__ __forceinline__ void finish(const Call& call, const Shared<D, WARPS>& shared, const float* out, int s, int head, int range,
                                       int ranges)
{
    for (int n = threadIdx.x; n < call.group() * D / 4; n += 32 * WARPS) {
        const int h = n / (D / 4), c = n % (D / 4) * 4;
        float best = LOWEST, all = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) best = fmaxf(best, shared.tops[w][h]);
        if (shared.alone) best = fmaxf(best, shared.newest[h]);
        float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = exp2_fast(shared.tops[w][h] - best), base = shared.base[w][h][c / 32];
            const float4 y = *reinterpret_cast<const float4*>(out + (w * HEADS + h) * D + c);
            x.x += factor * (y.x + base), x.y += factor * (y.y + base), x.z += factor * (y.z + base), x.w += factor * (y.w + base);
            all += factor * shared.sums[w][h];
        }
        if (shared.alone) {
            const float factor = exp2_fast(shared.newest[h] - best), inverse = 1 / (all + factor);
            float* to = at<float>(call.out) + shared.row * call.out_stride + (head * call.group() + h) * D + c;
            to[0] = (x.x + factor * shared.value[c]) * inverse, to[1] = (x.y + factor * shared.value[c + 1]) * inverse;
            to[2] = (x.z + factor * shared.value[c + 2]) * inverse, to[3] = (x.w + factor * shared.value[c + 3]) * inverse;
            continue;
        }
        float* partial = partial_of(call, ranges, s, head, range, h);
        *reinterpret_cast<float4*>(partial + c) = x;
        if (c == 0) partial[D] = best, partial[D + 1] = all;
    }
}

// Pages shared.begin ... shared.end of what is read -> the range's partial result.
template <int KIND, int D, int WARPS>
__device__ __forceinline__ void attend_range(const Call& call, Shared<D, WARPS>& shared, i64 position)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    constexpr int SIDE = side_bytes<KIND, D>();
    u8* ring = reinterpret_cast<u8*>(&shared + 1) + warp * shared.stages * SIDE;

    int logical = 0, entry = -1;  // of the warp's page number 32 * k + lane
    auto look_up = [&](int from) {
        const int mine = from + WARPS * lane, end = shared.end;
        logical = mine < end ? shared.list ? shared.list[HEADER + mine] : shared.first + mine : 0;
        entry = mine < end ? shared.table[logical] : -1;
    };
    const int pages = (max(shared.end - shared.begin - warp, 0) + WARPS - 1) / WARPS;
    look_up(shared.begin + warp);
    int sent = 0, stage_in = 0, stage_out = 0;
    auto send = [&] {  // the next side, if there is one
        if (sent < 2 * pages) {
            const int now = __shfl_sync(FULL_WARP, entry, sent / 2 % 32), start = __shfl_sync(FULL_WARP, logical, sent / 2 % 32) * PAGE;
            if (now >= 0)
                fetch_side<KIND, D>(Page(shared.pools, now), sent % 2 ? V : K, shared.slots - start, ring + stage_in * SIDE, lane);
            sent++, stage_in = stage_in + 1 == shared.stages ? 0 : stage_in + 1;
        }
        cp_async_commit();
    };
    auto arrive = [&] {  // the oldest side that was sent; the one before is done with, so that the next may take its place
        if (shared.stages == 2) cp_async_wait<0>();
        else cp_async_wait<1>();
        __syncwarp();
    };
    {
        Prepared<D, WARPS> prepared;
        Newest<D, WARPS> newest;
        for (int i = 0; i + 1 < shared.stages; i++) send();  // older pages are not written within a step
        wait_previous();
        prepared.load(call, shared.head, shared.row, position);
        if (shared.alone) newest.load(call, shared.head, shared.row, position), newest.store(shared);
        prepared.store(call, shared);
        for (int h = warp; shared.alone && h < call.group(); h += WARPS) {
            const float x = Newest<D, WARPS>::score(shared, h);
            if (lane == 0) shared.newest[h] = x;
        }
    }

    float sum[D / 16][4] = {}, base[2] = {}, top = LOWEST, total = 0;
    float* scores = shared.scores[warp];
    for (int round = 0; round < pages; round++) {
        const int now = __shfl_sync(FULL_WARP, entry, round % 32), start = __shfl_sync(FULL_WARP, logical, round % 32) * PAGE;
        const Page page(shared.pools, max(now, 0));
        arrive();
        if (sent % 64 == 0 && sent < 2 * pages) look_up(shared.begin + warp + WARPS * (sent / 2));
        send();
        if (now >= 0) score_any<KIND, D>(page, ring + stage_out * SIDE, shared.queries, scores, g, j);
        stage_out = stage_out + 1 == shared.stages ? 0 : stage_out + 1;
        __syncwarp();
        float p[8];
        const float4 a = *reinterpret_cast<const float4*>(scores + g * SCORE_STRIDE + 8 * j);
        const float4 b = *reinterpret_cast<const float4*>(scores + g * SCORE_STRIDE + 8 * j + 4);
        p[0] = a.x, p[1] = a.y, p[2] = a.z, p[3] = a.w, p[4] = b.x, p[5] = b.y, p[6] = b.z, p[7] = b.w;
        float best = LOWEST;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int slot = start + 8 * j + i;
            p[i] = slot < shared.low || slot >= shared.slots || now < 0 ? -infinity() : p[i] * shared.norms[g];
            best = fmaxf(best, p[i]);
        }
        best = quad_max(best);
        const bool moves = best > top + SLACK;
        if (__any_sync(FULL_WARP, moves)) {
            const float factor = moves ? exp2_fast(top - best) : 1;
            total *= factor, top = moves ? best : top;
            const float even = __shfl_sync(FULL_WARP, factor, 8 * j), odd = __shfl_sync(FULL_WARP, factor, 8 * j + 4);
#pragma unroll
            for (int i = 0; i < D / 16; i++) sum[i][0] *= even, sum[i][1] *= odd, sum[i][2] *= even, sum[i][3] *= odd;
            base[0] *= even, base[1] *= odd;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) p[i] = exp2_fast(p[i] - top), total += p[i];
        const Queries weights = {{floats_to_halves(p[0], p[2]), floats_to_halves(p[1], p[3])},
                                 {floats_to_halves(p[4], p[6]), floats_to_halves(p[5], p[7])}};
        arrive();
        if (sent % 64 == 0 && sent < 2 * pages) look_up(shared.begin + warp + WARPS * (sent / 2));
        send();
        if (now >= 0) weigh_any<KIND, D>(page, ring + stage_out * SIDE, weights, shared.slots - start, sum, base, g, j);
        stage_out = stage_out + 1 == shared.stages ? 0 : stage_out + 1;
    }
    cp_async_wait<0>();
    __syncthreads();  // the rings give way to sums
    float* out = reinterpret_cast<float*>(&shared + 1);
    total = quad_sum(total);
    if (j == 0) shared.tops[warp][g] = top, shared.sums[warp][g] = total;
#pragma unroll
    for (int tile = 0; tile < D / 16; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            out[(warp * HEADS + 2 * j + i % 2) * D + channel_of<KIND>(tile, i, g)] = sum[tile][i] * (1 / unit_of<KIND>(i));
    if (g < D / 32) shared.base[warp][2 * j][g] = base[0], shared.base[warp][2 * j + 1][g] = base[1];
    __syncthreads();
    finish<D, WARPS>(call, shared, out, blockIdx.y, shared.head, shared.range, shared.ranges);
}

// ranges: of pages, and the newest token's
template <int KIND, int D, int WARPS>
__device__ __forceinline__ void decode(const Call& call, int ranges, int stages)
{
    DYNAMIC_SHARED(uint4, memory);
    Shared<D, WARPS>& shared = *reinterpret_cast<Shared<D, WARPS>*>(memory);
    // Nothing of this changes within a step. Loads that do not depend on each other go together: each takes as long as a page.
    const int s = blockIdx.y, head = blockIdx.x % (int)call.kv_heads, range = blockIdx.x / (int)call.kv_heads;
    const int sequences = call.sequences(), row = call.first_row(s), next_row = call.first_row(s + 1);
    const i64 tables = at<i64>(call.page_tables)[s], counts = at<i64>(call.slot_counts)[s];
    const i64 selection = call.selection_group < 0 ? 0 : at<i64>(call.selections)[s];
    for (int i = threadIdx.x; i < POOLS * FIELDS; i += 32 * WARPS) shared.pools[i] = at<i64>(call.pools)[i];
    const bool runs = s < sequences && next_row - row == 1;
    const int* table = at<int>(tables) + (call.layer * call.kv_heads + head) * call.max_pages;
    const int slots = runs ? at<int>(counts)[call.layer * call.kv_heads + head] - 1 : 0;
    const i64 position = runs ? at<i64>(call.positions)[row] : 0;
    release_next();
    if (selection || !runs) wait_previous();  // lists are made by the kernel before
    if (!runs) return;
    const int* list = selection ? call.list_row(s, head) : nullptr;
    const int listed = list ? list[COUNT] : ALL, low = call.first_visible(slots);
    if (listed == ALL) list = nullptr;
    // of `slots` older tokens; at least one page
    const int first = list ? 0 : low / PAGE, count = list ? listed : slots / PAGE + 1 - first;
    // a page for each warp, two before a second range is worth being merged
    const int size = max((count + ranges - 2) / (ranges - 1), count <= 2 * WARPS ? count : WARPS), used = (count + size - 1) / size;
    const bool alone = used == 1 && call.compensation == 0, newest = range == ranges - 1;  // the newest token's block reads no page
    if (range >= used && (!newest || alone)) return wait_previous();
    if (threadIdx.x == 0) {
        shared.table = table, shared.list = list, shared.first = first, shared.head = head, shared.row = row, shared.used = used;
        shared.range = range, shared.ranges = ranges, shared.low = low, shared.slots = slots, shared.stages = stages;
        shared.alone = alone;
        shared.begin = range * size, shared.end = min(count, range * size + size);
    }
    __syncthreads();
    if (newest) {
        wait_previous();
        attend_newest<D, WARPS>(call, shared, position);
    } else {
        attend_range<KIND, D, WARPS>(call, shared, position);
        if (shared.alone) return;
    }
    if (last_to_arrive(blockIdx.y * (int)call.kv_heads + shared.head, shared.used + 1))
        merge_ranges(call, blockIdx.y, blockIdx.y, shared.head, 0, call.group(), shared.row, shared.ranges, shared.used + 1,
                     &shared.q[0][0], D, reinterpret_cast<float*>(&shared + 1));
}

#define DECODE(name, kind, depth, warps) \
    extern "C" __global__ void __launch_bounds__(32 * warps, 2) name(CALL_PARAMETERS i64 ranges, i64 stages) \
    { \
        decode<kind, depth, warps>(MAKE_CALL, (int)ranges, (int)stages); \
    }
DECODE(decode_f16_64, F16, 64, 4)
DECODE(decode_f16_128, F16, 128, 4)
DECODE(decode_int4_64, INT4, 64, 8)
DECODE(decode_int4_128, INT4, 128, 8)
DECODE(decode_mixed_64, MIXED, 64, 8)
DECODE(decode_mixed_128, MIXED, 128, 8)
