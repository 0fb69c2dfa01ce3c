// Decode attention: a block is one KV head of a sequence and one range of its pages, with all query heads of the group. Its warps take
// pages in turn, which come through rings in shared memory, keys and values in turn, while others are computed on. The newest token is in
// no page yet: a block of its own rotates it, attends to it and writes it, and takes the pages at both ends that are no codes. A step is
// one launch. All blocks of a KV head put the ranges together, each a part of the output, if all of the launch are on the device at once;
// else the last one to end does. Of few pages there is one range, whose block has the newest token as well and nothing to merge with.
//   grid    (ranges + 1, kv_heads, sequences); sequences with more than one row are left to the kernels of prefill
//   block   32 * WARPS threads
//   shared  Shared<D, WARPS>, then for each warp the places of sides and `stages` sides, 2 or 3 (warp_bytes)
#pragma once
#include "decode_merge.cuh"

// The newest token as if it were a range of its own; with it those pages at both ends of what is read that are still halves, a page for
// each warp: where a cache has codes the other blocks would read them slowly, from where they are. PREPARED: q is in shared memory.
template <int KIND, int D, int WARPS, bool PREPARED = false>
__device__ __forceinline__ void attend_newest(const Call& call, Shared<D, WARPS>& shared, i64 position)
{
    constexpr int ENDS = Shared<D, WARPS>::ENDS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const int mine = warp ? max(shared.count - ENDS + 1, 1) + warp - 1 : 0, end = shared.apart ? shared.count : 0;
    const int logical = mine < end ? shared.list ? shared.list[HEADER + mine] : shared.first + mine : 0;
    const int entry = mine < end ? shared.table[logical] : -1, start = logical * PAGE;
    const int bytes = warp_bytes<KIND, D>(shared.stages);
    u8* side = reinterpret_cast<u8*>(&shared + 1) + warp * bytes;
    const bool reads = entry >= 0 && of_halves(shared.pools, entry), both = KIND == F16 && bytes >= 2 * side_bytes<F16, D>();
    u8* values = side + (both ? side_bytes<F16, D>() : 0);  // else they come when keys are done with
    auto fetch_values = [&] {
        fetch_side<F16, D>(place_of(shared.pools, entry, V), V, shared.slots - start, values, lane);
        cp_async_commit();
    };
    if (reads) {
        fetch_side<F16, D>(place_of(shared.pools, entry, K), K, 0, side, lane);
        cp_async_commit();
        if (KIND == F16 && both) fetch_values();
        else for (int i = lane; i < D / 2; i += 32) prefetch_l2(codes_at(place_of(shared.pools, entry, V).codes) + 128 * i);
    }
    {
        Prepared<D, WARPS> prepared;
        Newest<D, WARPS> newest;
        if (!PREPARED) {
            prepared.load_angles(call, position);
            wait_previous();
            const u32 turn = shared.take_turn();
            prepared.load(call, shared.head, shared.row);
            if (threadIdx.x == 0) shared.turn = turn;
        }
        newest.load(call, shared.head, shared.row, position);
        newest.store(shared);
        if (!PREPARED) prepared.store(call, shared);
        __syncthreads();
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
        if (KIND != F16 || !both) fetch_values();
        const Queries& weights = sums.weigh(shared, shared.scores[warp], start, true, g, j);
        cp_async_wait<0>();
        __syncwarp();
        weigh_halves<D>(values, weights, sums.sum, g, j);
    }
    cp_async_wait<0>();
    finish<F16, D, WARPS>(call, shared, sums, true);
}

// Pages shared.begin ... shared.end of what is read, of which this block's warps take every shared.used * WARPS -th -> the range's partial
// result. entry: the table's of the warp's first page, where everything is read. PREPARED: q is in shared memory, and so is the table; the
// range is not the only one, and few pages are spread over all blocks.
template <int KIND, int D, int WARPS, bool PREPARED = false>
__device__ __forceinline__ void attend_range(const Call& call, Shared<D, WARPS>& shared, i64 position, int entry)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    constexpr u32 SIDE = side_bytes<KIND, D>();
    const u32 stages = shared.stages, ring_bytes = stages * SIDE;
    Place* places = reinterpret_cast<Place*>(reinterpret_cast<u8*>(&shared + 1) + warp * warp_bytes<KIND, D>(stages));
    u8* ring = reinterpret_cast<u8*>(places + SIDES);
    const int stride = shared.used * WARPS;
    const int begin = shared.begin + (PREPARED ? warp * shared.used + shared.range : shared.range * WARPS + warp);

    int logical = 0;  // of the page whose side is places[lane]
    auto find = [&](int from) {  // of the next SIDES sides, a lane each: the table's entry
        const int mine = from + stride * (lane / 2);
        logical = mine < shared.end ? shared.list ? shared.list[HEADER + mine] : shared.first + mine : 0;
        return mine < shared.end ? shared.table[logical] : -1;
    };
    auto place = [&](int found, int from) {  // what is computed of addresses is computed here
        if (found >= 0 && KIND != F16 && shared.apart && shared.at_an_end(from + stride * (lane / 2)) && of_halves(shared.pools, found))
            found = -1;
        places[lane] = found < 0 ? Place{0, 0} : place_of(shared.pools, found, lane % 2 ? V : K);
    };
    u32 sent = 0, into = 0, out_of = 0;
    int ahead = begin;  // the page whose side is sent next
    auto send = [&](bool looks_up) {  // that side, if there is one
        if (ahead < shared.end) {
            if (looks_up && sent % SIDES == 0) {
                const int found = find(ahead);
                __syncwarp();
                place(found, ahead);
                __syncwarp();
            }
            const Place& own = places[sent % SIDES];
            const int start = KIND == F16 ? __shfl_sync(FULL_WARP, logical, sent % SIDES) * PAGE : 0;
            if (own.codes) fetch_side<KIND, D>(own, sent % 2 ? V : K, shared.slots - start, ring + into, lane);
            if (sent % 2) ahead += stride;
            sent++, into = into + SIDE == ring_bytes ? 0 : into + SIDE;
        }
        cp_async_commit();
    };
    auto arrive = [&] {  // the oldest side that was sent; the one before is done with, so that the next may take its place
        if (stages == 2) cp_async_wait<0>();
        else cp_async_wait<1>();
        __syncwarp();
    };
    // The first page's sides leave before other places are known. Older pages are not written within a step.
    if (begin >= shared.end) entry = -1;
    else if (shared.list) entry = shared.table[shared.list[HEADER + begin]];
    else if (PREPARED || shared.first || (KIND == F16 && shared.alone)) entry = shared.table[shared.first + begin];
    const int others = find(begin);
    if (lane < 2) place(entry, begin);
    __syncwarp();
    for (u32 i = 0; i + 1 < stages; i++) send(false);
    if (lane >= 2) place(others, begin);
    __syncwarp();
    if (!PREPARED) {
        Prepared<D, WARPS> prepared;
        Newest<D, WARPS> newest;
        prepared.load_angles(call, position);
        wait_previous();
        const u32 turn = shared.take_turn();
        prepared.load(call, shared.head, shared.row);
        if (threadIdx.x == 0) shared.turn = turn;
        if (shared.alone) newest.load(call, shared.head, shared.row, position), newest.store(shared);
        prepared.store(call, shared);
        __syncthreads();
        for (int h = warp; shared.alone && h < call.group(); h += WARPS) {
            const float x = Newest<D, WARPS>::score(shared, h);
            if (lane == 0) shared.newest[h] = x;
        }
    }

    Sums<D> sums;
    float* scores = shared.scores[warp];
    u32 side = 0;
    for (int page = begin; page < shared.end; page += stride, side += 2) {
        const i64 keys = places[side % SIDES].codes, values = places[side % SIDES + 1].codes;  // send() may look up the next ones
        const int start = __shfl_sync(FULL_WARP, logical, side % SIDES) * PAGE;
        arrive();
        send(true);
        if (keys) score_any<KIND, D>(keys, ring + out_of, shared.queries, scores, g, j);
        out_of = out_of + SIDE == ring_bytes ? 0 : out_of + SIDE;
        __syncwarp();
        const Queries& weights = sums.weigh(shared, scores, start, keys != 0, g, j);
        arrive();
        send(true);
        if (values) weigh_any<KIND, D>(values, ring + out_of, weights, shared.slots - start, sums.sum, sums.base, g, j);
        out_of = out_of + SIDE == ring_bytes ? 0 : out_of + SIDE;
    }
    cp_async_wait<0>();
    finish<KIND, D, WARPS>(call, shared, sums, shared.alone);
}

template <int KIND, int D, int WARPS>
__device__ __forceinline__ void decode(const Call& call, int stages, const Exchange& exchange)
{
    DYNAMIC_SHARED(uint4, memory);
    Shared<D, WARPS>& shared = *reinterpret_cast<Shared<D, WARPS>*>(memory);
    constexpr int ENDS = Shared<D, WARPS>::ENDS;
    // Nothing of this changes within a step. Loads that do not depend on each other go together: each takes as long as a page.
    const int s = blockIdx.z, head = blockIdx.y, range = blockIdx.x, ranges = gridDim.x - 1;
    const int sequences = call.sequences(), row = call.first_row(s), next_row = call.first_row(s + 1);
    const i64 tables = at<i64>(call.page_tables)[s], counts = at<i64>(call.slot_counts)[s];
    const i64 selection = call.selection_group < 0 ? 0 : at<i64>(call.selections)[s];
    const i64 pool = threadIdx.x < POOLS * FIELDS ? at<i64>(call.pools)[threadIdx.x] : 0;
    const bool runs = s < sequences && next_row - row == 1;
    const int place = (int)call.layer * (int)call.kv_heads + head;
    const int* table = at<int>(tables) + place * call.max_pages;
    const int likely = range * WARPS + threadIdx.x / 32 + (KIND == F16);  // the warp's first page, if all are read by all blocks
    const int slots = runs ? at<int>(counts)[place] - 1 : 0, entry = runs && likely < call.max_pages ? table[likely] : -1;
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
    const int apart = KIND == F16 ? ENDS : 0;  // the newest token's block has those at both ends
    const int used = count <= 2 * WARPS ? 1 : min(ranges, (count - apart + WARPS - 1) / WARPS);
    const bool alone = used == 1 && call.compensation == 0;
    if (range > used || (range && alone)) return wait_previous();
    if (threadIdx.x < POOLS * FIELDS) shared.pools[threadIdx.x] = pool;
    const int gang = s * (int)call.kv_heads + head;
    if (threadIdx.x == 0) {
        shared.told = exchange.memory ? exchange.words(gang, 0) : nullptr, shared.turn_at = exchange.turn(gang);
        shared.table = table, shared.list = list, shared.first = first, shared.head = head, shared.row = row, shared.used = used;
        shared.range = range, shared.low = low, shared.slots = slots, shared.stages = stages, shared.alone = alone, shared.count = count;
        shared.apart = !alone && warp_bytes<KIND, D>(stages) >= side_bytes<F16, D>();  // else there is no room for halves
        shared.begin = KIND == F16 && !alone, shared.end = KIND == F16 && !alone ? count - ENDS + 1 : count;
    }
    __syncthreads();
    if (range == used) {
        attend_newest<KIND, D, WARPS>(call, shared, position);
    } else {
        attend_range<KIND, D, WARPS>(call, shared, position, entry);
        if (alone) return;
    }
    if (shared.told)
        merge_share<D, WARPS>(call, shared);
    else if (last_to_arrive(gang, used + 1))
        merge_ranges(call, s, s, head, 0, call.group(), row, gridDim.x, used + 1, &shared.q[0][0], D, reinterpret_cast<float*>(&shared + 1),
                     WARPS * warp_bytes<KIND, D>(stages) / 4);
}
