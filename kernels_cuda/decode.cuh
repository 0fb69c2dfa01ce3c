// Decode attention: a block is one KV head of a sequence and one range of its pages, with all query heads of the group. Its warps take
// pages in turn, which come through rings in shared memory, keys and values in turn, while others are computed on. The newest token is in
// no page yet: a block of its own rotates it, attends to it and writes it, and takes the pages at both ends that are no codes. The last
// block of a KV head to end merges all of them, so that a step is one launch. Of few pages there is one range, whose block has the newest
// token as well and nothing to merge with.
//   grid    (kv_heads * (ranges + 1), sequences), a KV head's blocks side by side; sequences with more than one row are left to the
//           kernels of prefill
//   block   32 * WARPS threads
//   shared  Shared<D, WARPS>, then for each warp the places of sides and `stages` sides, 2 or 3 (warp_bytes)
#pragma once
#include "decode_block.cuh"

// What a warp has of some pages, of the query heads g: weighted values and what minima add to them (attention_decode.cuh), the reference of
// weights and their sum.
template <int D> struct Sums {
    float sum[D / 16][4] = {}, base[2] = {}, top = LOWEST, total = 0;
    Queries weights;

    // Scores of a page -> the weights of its values.
    template <int WARPS>
    __device__ __forceinline__ const Queries& weigh(const Shared<D, WARPS>& shared, const float* scores, int start, bool there, int g,
                                                    int j)
    {
        float p[8];
        const float4 a = *reinterpret_cast<const float4*>(scores + g * SCORE_STRIDE + 8 * j);
        const float4 b = *reinterpret_cast<const float4*>(scores + g * SCORE_STRIDE + 8 * j + 4);
        p[0] = a.x, p[1] = a.y, p[2] = a.z, p[3] = a.w, p[4] = b.x, p[5] = b.y, p[6] = b.z, p[7] = b.w;
        if (start < shared.low || start + PAGE > shared.slots || !there) {  // few pages have hidden slots
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int slot = start + 8 * j + i;
                if (slot < shared.low || slot >= shared.slots || !there) p[i] = -infinity();
            }
        }
        float best = p[0];
#pragma unroll
        for (int i = 1; i < 8; i++) best = fmaxf(best, p[i]);
        const float norm = shared.norms[g];
        best = quad_max(best) * norm;
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
        for (int i = 0; i < 8; i++) p[i] = exp2_fast(fmaf(p[i], norm, -top)), total += p[i];
        weights[0][0] = floats_to_halves(p[0], p[2]), weights[0][1] = floats_to_halves(p[1], p[3]);
        weights[1][0] = floats_to_halves(p[4], p[6]), weights[1][1] = floats_to_halves(p[5], p[7]);
        return weights;
    }
};

// Sums of the warps, and with `newest` the newest token -> the range's partial result, or of the only range the output.
template <int KIND, int D, int WARPS>
__device__ __forceinline__ void finish(const Call& call, Shared<D, WARPS>& shared, const Sums<D>& sums, bool newest)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    float* out = reinterpret_cast<float*>(&shared + 1);  // [WARPS][HEADS][D]
    const float total = quad_sum(sums.total);
    __syncthreads();  // the rings give way to sums
    if (j == 0) shared.tops[warp][g] = sums.top, shared.sums[warp][g] = total;
#pragma unroll
    for (int tile = 0; tile < D / 16; tile++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            out[(warp * HEADS + 2 * j + i % 2) * D + channel_of<KIND>(tile, i, g)] = sums.sum[tile][i] * (1 / unit_of<KIND>(i));
    if (g < D / 32) shared.base[warp][2 * j][g] = sums.base[0], shared.base[warp][2 * j + 1][g] = sums.base[1];
    __syncthreads();
    for (int n = threadIdx.x; n < call.group() * D / 4; n += 32 * WARPS) {
        const int h = n / (D / 4), c = n % (D / 4) * 4;
        float best = newest ? shared.newest[h] : LOWEST, all = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) best = fmaxf(best, shared.tops[w][h]);
        float4 x = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float factor = exp2_fast(shared.tops[w][h] - best), base = shared.base[w][h][c / 32];
            const float4 y = *reinterpret_cast<const float4*>(out + (w * HEADS + h) * D + c);
            x.x += factor * (y.x + base), x.y += factor * (y.y + base), x.z += factor * (y.z + base), x.w += factor * (y.w + base);
            all += factor * shared.sums[w][h];
        }
        if (newest) {
            const float factor = exp2_fast(shared.newest[h] - best);
            const float* value = shared.value + c;
            x.x += factor * value[0], x.y += factor * value[1], x.z += factor * value[2], x.w += factor * value[3], all += factor;
        }
        if (shared.alone) {
            const float inverse = 1 / all;
            float* to = at<float>(call.out) + shared.row * call.out_stride + (shared.head * call.group() + h) * D + c;
            to[0] = x.x * inverse, to[1] = x.y * inverse, to[2] = x.z * inverse, to[3] = x.w * inverse;
            continue;
        }
        float* partial = partial_of(call, shared.ranges, blockIdx.y, shared.head, shared.range, h);
        *reinterpret_cast<float4*>(partial + c) = x;
        if (c == 0) partial[D] = best, partial[D + 1] = all;
    }
}

// The newest token as if it were a range of its own; with it those pages at both ends of what is read that are still halves, a page for
// each warp: where a cache has codes the other blocks would read them slowly, from where they are. PREPARED: q is in shared memory.
template <int KIND, int D, int WARPS, bool PREPARED = false>
__device__ __forceinline__ void attend_newest(const Call& call, Shared<D, WARPS>& shared, i64 position)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const int mine = warp ? max(shared.count - ENDS + 1, 1) + warp - 1 : 0, end = shared.apart ? shared.count : 0;
    const int logical = mine < end ? shared.list ? shared.list[HEADER + mine] : shared.first + mine : 0;
    const int entry = mine < end ? shared.table[logical] : -1, start = logical * PAGE;
    u8* side = reinterpret_cast<u8*>(&shared + 1) + warp * warp_bytes<KIND, D>(shared.stages);
    const bool reads = entry >= 0 && of_halves(shared.pools, entry);
    if (reads) fetch_side<F16, D>(place_of(shared.pools, entry, K), K, 0, side, lane);
    cp_async_commit();
    {
        Prepared<D, WARPS> prepared;
        Newest<D, WARPS> newest;
        if (!PREPARED) wait_previous(), prepared.load(call, shared.head, shared.row, position);
        newest.load(call, shared.head, shared.row, position);
        newest.store(shared);
        if (PREPARED) __syncthreads();
        else prepared.store(call, shared);
        for (int h = warp; h < call.group(); h += WARPS) {
            const float x = Newest<D, WARPS>::score(shared, h);
            if (lane == 0) shared.newest[h] = x;
        }
    }
    Sums<D> sums;
    if (reads) {
        cp_async_wait<0>();
        __syncwarp();
        score_page<F16, D>(side, shared.queries, shared.scores[warp], g, j);
        __syncwarp();
        fetch_side<F16, D>(place_of(shared.pools, entry, V), V, shared.slots - start, side, lane);
        cp_async_commit();
        const Queries& weights = sums.weigh(shared, shared.scores[warp], start, true, g, j);
        cp_async_wait<0>();
        __syncwarp();
        weigh_halves<D>(side, weights, sums.sum, g, j);
    }
    cp_async_wait<0>();
    finish<F16, D, WARPS>(call, shared, sums, true);
}

// Pages shared.begin ... shared.end of what is read -> the range's partial result. PREPARED: q is in shared memory, and the range is not
// the only one.
template <int KIND, int D, int WARPS, bool PREPARED = false>
__device__ __forceinline__ void attend_range(const Call& call, Shared<D, WARPS>& shared, i64 position)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    constexpr int SIDE = side_bytes<KIND, D>();
    Place* places = reinterpret_cast<Place*>(reinterpret_cast<u8*>(&shared + 1) + warp * warp_bytes<KIND, D>(shared.stages));
    u8* ring = reinterpret_cast<u8*>(places + SIDES);

    int logical = 0;  // of the page whose side is places[lane]
    auto look_up = [&](int from) {  // the next SIDES sides, a lane each: what is computed of addresses is computed here
        const int mine = from + WARPS * (lane / 2), end = shared.end;
        logical = mine < end ? shared.list ? shared.list[HEADER + mine] : shared.first + mine : 0;
        int entry = mine < end ? shared.table[logical] : -1;
        if (entry >= 0 && shared.apart && shared.at_an_end(mine) && of_halves(shared.pools, entry)) entry = -1;
        const Place own = entry < 0 ? Place{0, 0} : place_of(shared.pools, entry, lane % 2 ? V : K);
        __syncwarp();
        places[lane] = own;
        __syncwarp();
    };
    const int sides = 2 * ((max(shared.end - shared.begin - warp, 0) + WARPS - 1) / WARPS);
    int sent = 0, stage_in = 0, stage_out = 0;
    auto send = [&] {  // the next side, if there is one
        if (sent < sides) {
            if (sent % SIDES == 0) look_up(shared.begin + warp + WARPS * (sent / 2));
            const Place& place = places[sent % SIDES];
            const int start = KIND == F16 ? __shfl_sync(FULL_WARP, logical, sent % SIDES) * PAGE : 0;
            if (place.codes) fetch_side<KIND, D>(place, sent % 2 ? V : K, shared.slots - start, ring + stage_in * SIDE, lane);
            sent++, stage_in = stage_in + 1 == shared.stages ? 0 : stage_in + 1;
        }
        cp_async_commit();
    };
    auto arrive = [&] {  // the oldest side that was sent; the one before is done with, so that the next may take its place
        if (shared.stages == 2) cp_async_wait<0>();
        else cp_async_wait<1>();
        __syncwarp();
    };
    for (int i = 0; i + 1 < shared.stages; i++) send();  // older pages are not written within a step
    if (!PREPARED) {
        Prepared<D, WARPS> prepared;
        Newest<D, WARPS> newest;
        wait_previous();
        prepared.load(call, shared.head, shared.row, position);
        if (shared.alone) newest.load(call, shared.head, shared.row, position), newest.store(shared);
        prepared.store(call, shared);
        for (int h = warp; shared.alone && h < call.group(); h += WARPS) {
            const float x = Newest<D, WARPS>::score(shared, h);
            if (lane == 0) shared.newest[h] = x;
        }
    }

    Sums<D> sums;
    float* scores = shared.scores[warp];
    for (int side = 0; side < sides; side += 2) {
        const i64 keys = places[side % SIDES].codes, values = places[side % SIDES + 1].codes;  // send() may look up the next ones
        const int start = __shfl_sync(FULL_WARP, logical, side % SIDES) * PAGE;
        arrive();
        send();
        if (keys) score_any<KIND, D>(keys, ring + stage_out * SIDE, shared.queries, scores, g, j);
        stage_out = stage_out + 1 == shared.stages ? 0 : stage_out + 1;
        __syncwarp();
        const Queries& weights = sums.weigh(shared, scores, start, keys != 0, g, j);
        arrive();
        send();
        if (values) weigh_any<KIND, D>(values, ring + stage_out * SIDE, weights, shared.slots - start, sums.sum, sums.base, g, j);
        stage_out = stage_out + 1 == shared.stages ? 0 : stage_out + 1;
    }
    cp_async_wait<0>();
    finish<KIND, D, WARPS>(call, shared, sums, shared.alone);
}

// ranges: of pages, and the newest token's
template <int KIND, int D, int WARPS>
__device__ __forceinline__ void decode(const Call& call, int ranges, int stages)
{
    DYNAMIC_SHARED(uint4, memory);
    Shared<D, WARPS>& shared = *reinterpret_cast<Shared<D, WARPS>*>(memory);
    // Nothing of this changes within a step. Loads that do not depend on each other go together: each takes as long as a page.
    const int s = blockIdx.y, head = blockIdx.x / ranges, range = blockIdx.x % ranges;
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
        shared.range = newest ? used : range, shared.ranges = ranges, shared.low = low, shared.slots = slots, shared.stages = stages;
        shared.alone = alone, shared.count = count;
        shared.apart = KIND != F16 && !alone && warp_bytes<KIND, D>(stages) >= side_bytes<F16, D>();  // else there is no room for halves
        shared.begin = range * size, shared.end = min(count, range * size + size);
    }
    __syncthreads();
    if (newest) {
        attend_newest<KIND, D, WARPS>(call, shared, position);
    } else {
        attend_range<KIND, D, WARPS>(call, shared, position);
        if (shared.alone) return;
    }
    if (last_to_arrive(blockIdx.y * (int)call.kv_heads + shared.head, shared.used + 1))
        merge_ranges(call, blockIdx.y, blockIdx.y, shared.head, 0, call.group(), shared.row, shared.ranges, shared.used + 1,
                     &shared.q[0][0], D, reinterpret_cast<float*>(&shared + 1), WARPS * warp_bytes<KIND, D>(stages) / 4);
}
