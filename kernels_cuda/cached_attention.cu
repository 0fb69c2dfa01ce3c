// Decode attention: a block is one KV head of a sequence and one range of its pages, with all query heads of the group. A warp takes every fourth page of
// the range; its pages come through a ring in shared memory, keys and values in turn, while others are computed on. The last block of a
// KV head to end merges all its ranges. The newest token is no page's yet: the block of the last range rotates it, attends to it and writes it.
// So a step is one launch.
//   grid    (kv_heads * ranges, sequences)    sequences with more than one row are left to the kernels of prefill
//   block   128 threads
//   shared  Shared<D>, then `stages` sides of 64 * D bytes for each warp
#include "attention_decode.cuh"

template <int D> struct Shared {
    float q[HEADS][D];
    uint4 queries[D / 32][32];  // what each lane multiplies with 32 channels, the same for all warps
    float norms[HEADS], tops[WARPS + 1][HEADS], sums[WARPS + 1][HEADS], base[WARPS][HEADS][D / 32];  // the last: of the newest token
    float key[D], value[D];
    i64 pools[POOLS * FIELDS];
    float scores[WARPS][HEADS * SCORE_STRIDE];
};

// q of the group, rotated, times scale * log2 e, to shared memory: as floats, and for each lane as halves of q over its head's largest.
template <int D>
__device__ __forceinline__ void prepare_queries(const Call& call, int head, int row, Shared<D>& shared)
{
    const int group = call.group(), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const float* x = at<float>(call.q) + row * call.q_stride + head * group * D;
    const i64 position = at<i64>(call.positions)[row];
#pragma unroll
    for (int h = warp; h < HEADS; h += WARPS) {
        float top = 0;
#pragma unroll
        for (int c = lane; c < D; c += 32) {
            const float y = h < group ? rotated(call, x + h * D, position, c) * call.scale() * LOG2E : 0;
            shared.q[h][c] = y, top = fmaxf(top, fabsf(y));
        }
        top = fmaxf(warp_max(top), 1e-30f);
        if (lane == 0) shared.norms[h] = top;
    }
    __syncthreads();
    const float inverse = 1 / shared.norms[g];
    for (int block = warp; block < D / 32; block += WARPS) {
        const float4 a = *reinterpret_cast<const float4*>(&shared.q[g][32 * block + 8 * j]);
        const float4 b = *reinterpret_cast<const float4*>(&shared.q[g][32 * block + 8 * j + 4]);
        shared.queries[block][lane] = make_uint4(floats_to_halves(a.x * inverse, a.z * inverse), floats_to_halves(a.y * inverse, a.w * inverse),
                                                 floats_to_halves(b.x * inverse, b.z * inverse), floats_to_halves(b.y * inverse, b.w * inverse));
    }
}

// The newest token, in halves as its page will hold it: into its page, and as if it were a warp's result.
template <int D>
__device__ __forceinline__ void newest_token(const Call& call, int s, int head, int row, int slot, Shared<D>& shared)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const i64 position = at<i64>(call.positions)[row];
    const float* k = at<float>(call.k) + row * call.k_stride + head * D;
    const float* v = at<float>(call.v) + row * call.v_stride + head * D;
    const Page page(shared.pools, call.table(s, head)[slot / PAGE]);
    for (int c = threadIdx.x; c < D; c += 32 * WARPS) {
        const u16 key = float_to_half(rotated(call, k, position, c)), value = float_to_half(v[c]);
        shared.key[c] = half_to_float(key), shared.value[c] = half_to_float(value);
        at<u16>(page.place(K))[c * PAGE + slot % PAGE] = key, at<u16>(page.place(V))[slot % PAGE * D + c] = value;
    }
    __syncthreads();
    for (int h = warp; h < HEADS; h += WARPS) {
        float x = 0;
        for (int c = lane; c < D; c += 32) x += shared.q[h][c] * shared.key[c];
        x = warp_sum(x);
        if (lane == 0) shared.tops[WARPS][h] = x, shared.sums[WARPS][h] = 1;
    }
}

// Results of the warps -> the range's partial result, and the output where it is the last range to end. out: [WARPS][HEADS][D].
template <int D> __device__ __forceinline__ void finish(const Call& call, const Shared<D>& shared, float* out, int s, int head, int row, int range,
                                                        int ranges, int used)
{
    const int group = call.group(), parts = range == used - 1 ? WARPS + 1 : WARPS;
    for (int n = threadIdx.x; n < group * D / 4; n += 32 * WARPS) {
        const int h = n / (D / 4), c = n % (D / 4) * 4;
        float best = LOWEST, all = 0;
        for (int w = 0; w < parts; w++) best = fmaxf(best, shared.tops[w][h]);
        float4 x = make_float4(0, 0, 0, 0);
        for (int w = 0; w < parts; w++) {
            const float factor = exp2_fast(shared.tops[w][h] - best), base = w < WARPS ? shared.base[w][h][c / 32] : 0;
            const float4 y = *reinterpret_cast<const float4*>(w < WARPS ? out + (w * HEADS + h) * D + c : shared.value + c);
            x.x += factor * (y.x + base), x.y += factor * (y.y + base), x.z += factor * (y.z + base), x.w += factor * (y.w + base);
            all += factor * shared.sums[w][h];
        }
        float* partial = partial_of(call, ranges, s, head, range, h);
        *reinterpret_cast<float4*>(partial + c) = x;
        if (c == 0) partial[D] = best, partial[D + 1] = all;
    }
    if (last_to_arrive(s * (int)call.kv_heads + head, used)) merge_ranges(call, s, s, head, 0, group, row, ranges, used, &shared.q[0][0], D, out);
}

template <int KIND_K, int KIND_V, int D>
__device__ __forceinline__ void decode(const Call& call, int ranges, int stages)
{
    extern __shared__ uint4 memory[];
    Shared<D>& shared = *reinterpret_cast<Shared<D>*>(memory);
    wait_previous();
    // everything that does not depend on each other at once: a load from far away takes as long as a page
    const int s = blockIdx.y, head = blockIdx.x % (int)call.kv_heads, range = blockIdx.x / (int)call.kv_heads;
    const int sequences = call.sequences(), row = call.first_row(s), next_row = call.first_row(s + 1);
    const i64 tables = at<i64>(call.page_tables)[s], counts = at<i64>(call.slot_counts)[s], selection = call.selection_group < 0 ? 0 : at<i64>(call.selections)[s];
    for (int i = threadIdx.x; i < POOLS * FIELDS; i += 32 * WARPS) shared.pools[i] = at<i64>(call.pools)[i];
    if (s >= sequences || next_row - row != 1) return;
    const int* list = selection ? call.list_row(s, head) : nullptr;
    const int* table = at<int>(tables) + (call.layer * call.kv_heads + head) * call.max_pages;
    const int slots = at<int>(counts)[call.layer * call.kv_heads + head] - 1, listed = list ? list[COUNT] : ALL, low = call.first_visible(slots);
    if (listed == ALL) list = nullptr;
    const int first = list ? 0 : low / PAGE, count = list ? listed : slots / PAGE + 1 - first;  // of `slots` older tokens; at least one page
    const int size = (count + ranges - 1) / ranges, used = (count + size - 1) / size;
    if (range >= used) return;
    const int begin = range * size, end = min(count, begin + size);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    u8* ring = reinterpret_cast<u8*>(&shared + 1) + warp * stages * 64 * D;
    __syncthreads();

    int logical = 0, entry = -1;  // of the warp's page number 32 * k + lane
    auto look_up = [&](int from) {
        const int mine = from + WARPS * lane;
        logical = mine < end ? list ? list[HEADER + mine] : first + mine : 0;
        entry = mine < end ? table[logical] : -1;
    };
    const int pages = begin + warp < end ? (end - begin - warp + WARPS - 1) / WARPS : 0;
    look_up(begin + warp);
    int sent = 0, stage_in = 0, stage_out = 0;
    auto send = [&] {  // the next side, if there is one
        if (sent < 2 * pages) {
            const int now = __shfl_sync(FULL_WARP, entry, sent / 2 % 32), start = __shfl_sync(FULL_WARP, logical, sent / 2 % 32) * PAGE;
            if (now >= 0) fetch_side<D>(Page(shared.pools, now), sent % 2 ? V : K, slots - start, ring + stage_in * 64 * D, lane);
            sent++, stage_in = stage_in + 1 == stages ? 0 : stage_in + 1;
        }
        cp_async_commit();
    };
    auto arrive = [&] {  // the oldest side that was sent; the one before is done with, so that the next may take its place
        if (stages == 2) cp_async_wait<0>();
        else cp_async_wait<1>();
        __syncwarp();
    };
    for (int i = 0; i + 1 < stages; i++) send();
    prepare_queries<D>(call, head, row, shared);
    if (range == used - 1) newest_token<D>(call, s, head, row, slots, shared);
    __syncthreads();

    float sum[D / 16][4] = {}, base[4] = {}, top = LOWEST, total = 0;
    const float norm = shared.norms[g];
    float* scores = shared.scores[warp];
    for (int round = 0; round < pages; round++) {
        const int now = __shfl_sync(FULL_WARP, entry, round % 32), start = __shfl_sync(FULL_WARP, logical, round % 32) * PAGE;
        const Page page(shared.pools, max(now, 0));
        arrive();
        if (sent % 64 == 0 && sent < 2 * pages) look_up(begin + warp + WARPS * (sent / 2));
        send();
        if (now >= 0) score_any<KIND_K, D>(page.kind(K_KIND), ring + stage_out * 64 * D, shared.queries, scores, g, j);
        stage_out = stage_out + 1 == stages ? 0 : stage_out + 1;
        __syncwarp();
        float p[8];
        const float4 a = *reinterpret_cast<const float4*>(scores + g * SCORE_STRIDE + 8 * j);
        const float4 b = *reinterpret_cast<const float4*>(scores + g * SCORE_STRIDE + 8 * j + 4);
        p[0] = a.x, p[1] = a.y, p[2] = a.z, p[3] = a.w, p[4] = b.x, p[5] = b.y, p[6] = b.z, p[7] = b.w;
        float best = LOWEST;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int slot = start + 8 * j + i;
            p[i] = slot < low || slot >= slots || now < 0 ? -infinity() : p[i] * norm;
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
        const Queries weights = {{floats_to_halves(p[0], p[2]), floats_to_halves(p[1], p[3])}, {floats_to_halves(p[4], p[6]), floats_to_halves(p[5], p[7])}};
        arrive();
        if (sent % 64 == 0 && sent < 2 * pages) look_up(begin + warp + WARPS * (sent / 2));
        send();
        if (now >= 0) weigh_any<KIND_V, D>(page.kind(V_KIND), ring + stage_out * 64 * D, weights, sum, base, g, j);
        stage_out = stage_out + 1 == stages ? 0 : stage_out + 1;
    }
    release_next();
    cp_async_wait<0>();
    __syncthreads();  // the rings give way to sums
    float* out = reinterpret_cast<float*>(&shared + 1);
    total = quad_sum(total);
    if (j == 0) shared.tops[warp][g] = top, shared.sums[warp][g] = total;
#pragma unroll
    for (int tile = 0; tile < D / 16; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++) out[(warp * HEADS + 2 * j + i % 2) * D + channel_of<KIND_V>(tile, i, g)] = sum[tile][i];
    if (g < D / 32) shared.base[warp][2 * j][g] = base[0], shared.base[warp][2 * j + 1][g] = base[1];
    __syncthreads();
    finish<D>(call, shared, out, s, head, row, range, ranges, used);
}

#define DECODE(name, kind_k, kind_v, depth) \
    extern "C" __global__ void __launch_bounds__(128, 2) name(CALL_PARAMETERS i64 ranges, i64 stages) \
    { \
        decode<kind_k, kind_v, depth>(MAKE_CALL, (int)ranges, (int)stages); \
    }
DECODE(decode_f16_64, F16, F16, 64)
DECODE(decode_f16_128, F16, F16, 128)
DECODE(decode_int4_64, INT4, INT4, 64)
DECODE(decode_int4_128, INT4, INT4, 128)
DECODE(decode_mixed_64, MIXED, MIXED, 64)
DECODE(decode_mixed_128, MIXED, MIXED, 128)
