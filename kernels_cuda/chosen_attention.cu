// A decode step's choice of pages and its attention to them as one launch: what select_pages does by bounds out of the parameters of
// quantised keys, each KV head by itself, and the decode kernels behind it. The blocks of a KV head are a gang. Each tells the scores of
// its part of the pages; from all of them every block finds the best pages by itself and takes its share of them. The first block writes
// the list for later steps, once all have come and know it as it was.
//   grid    (blocks, kv_heads, sequences)
//   shared  Shared<D, WARPS>; `room` bytes: weights, Best, Choice and `tiles` of each warp or scores, then what decode keeps; `pages` ints,
//           the page table; the list
#include "best_pages.cuh"
#include "decode.cuh"
#include "bound_tiles.cuh"

#define BEST_BYTES 5728  // for Best and Choice: chosen_attention.py

// What a KV head's list is to become.
struct Choice {
    int count, age, interval, slots, total, free;  // of the list as it is: its header; pages held; pages to be found by scores
    int2 range;                                    // of pages that scores decide about
    bool again, follows, dense, scored;

    // row: of the list; share, sealed: the KV head's
    __device__ __forceinline__ Choice(const Selection& a, const int* row, int slots, float share, int sealed)
        : slots(slots), total(a.total(slots))
    {
        const int made_at = row[SLOTS];
        count = row[COUNT], age = row[AGE], interval = row[INTERVAL];
        follows = count >= 0 && made_at + age + 1 == slots, again = follows && count >= 1 && age + 1 < interval;
        const int wanted = a.wanted_of(share, slots), each = max(1, (int)a.block);
        range = a.candidates_of(sealed, total);
        const int always = total - range.y + range.x;
        free = max(wanted - always, 0) / each * each;
        dense = !again && (wanted >= total || free >= range.y - range.x || always + free > a.call.selection_capacity - 2);
        scored = !again && !dense && free > 0;
    }
};

static_assert(sizeof(Best) + sizeof(Choice) <= BEST_BYTES, "the launcher counts as many");

// The list and its header as later steps find them, and the counters: by all threads of the block that does this for a KV head. list: in
// shared memory, `reads` pages; best: which of the pages that scores decide about are in it.
__device__ __forceinline__ void keep_list(const Selection& a, const Choice& c, Best& best, int s, int head, const int* list, int reads,
                                          int found)
{
    int* row = a.call.list_row(s, head);
    const float reuse = __int_as_float((int)a.reuse);
    const bool compares = reuse > 0 && c.follows && !c.again && !c.dense;
    if (compares && c.scored) {
#pragma unroll 1
        for (int i = threadIdx.x; i < c.count; i += blockDim.x) {
            const int place = row[HEADER + i] - c.range.x;
            if (place >= 0 && place < c.range.y - c.range.x && best.has(place)) atomicAdd(&best.kept, 1u);
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int i = (c.again ? c.count : 0) + threadIdx.x; i < reads && !c.dense; i += blockDim.x) row[HEADER + i] = list[HEADER + i];
    if (threadIdx.x) return;
    int next = c.again ? c.interval : 1;
    if (compares) next = (float)best.kept / (float)max(found, 1) >= reuse ? min(2 * c.interval, LONGEST) : max(c.interval / 2, 1);
    row[COUNT] = c.dense ? ALL : reads, row[AGE] = c.again ? c.age + 1 : 0, row[INTERVAL] = next;
    if (!c.again) row[SLOTS] = c.slots;
    if (!a.stats) return;
    u64* stats = at<u64>(a.stats) + STATS * a.call.layer;
    atomicAdd(stats + (c.dense ? DENSE : SPARSE), 1ull), atomicAdd(stats + READ, (u64)(c.dense ? c.total : reads));
    atomicAdd(stats + HELD, (u64)c.total), atomicAdd(stats + REUSED, (u64)c.again);
}

template <int KIND, int D, int WARPS>
__device__ __forceinline__ void choose_and_attend(const Selection& a, int stages, int room, int pages, int tiles, const Exchange& exchange)
{
    DYNAMIC_SHARED(uint4, memory);
    Shared<D, WARPS>& shared = *reinterpret_cast<Shared<D, WARPS>*>(memory);
    u8* const rings = reinterpret_cast<u8*>(&shared + 1);
    Weights<D>& weights = *reinterpret_cast<Weights<D>*>(rings);
    Best& best = *reinterpret_cast<Best*>(&weights + 1);
    Choice& c = *reinterpret_cast<Choice*>(&best + 1);
    u8* const behind = rings + sizeof(weights) + BEST_BYTES;
    Tile<D>* const own_tiles = reinterpret_cast<Tile<D>*>(behind) + threadIdx.x / 32 * tiles;
    float* const values = reinterpret_cast<float*>(behind);
    int* const table = reinterpret_cast<int*>(rings + room);
    int* const list = table + pages;
    const Call& call = a.call;
    // Nothing of this changes within a step but by this kernel. Loads that do not depend on each other go together.
    const int s = blockIdx.z, head = blockIdx.y, own = blockIdx.x, blocks = gridDim.x, gang = s * (int)call.kv_heads + head;
    const int sequences = call.sequences(), row = call.first_row(s), next_row = call.first_row(s + 1);
    const i64 tables = at<i64>(call.page_tables)[s], counts = at<i64>(call.slot_counts)[s], seals = at<i64>(a.sealed)[s];
    const i64 lists = at<i64>(call.selections)[s];
    const bool selects = lists != 0;
    const float share = a.share_of(head);
#pragma unroll 1
    for (int i = threadIdx.x; i < POOLS * FIELDS; i += 32 * WARPS) shared.pools[i] = at<i64>(call.pools)[i];
    release_next();
    if (s >= sequences || next_row - row != 1) return wait_previous();
    {
        const int place = (int)call.layer * (int)call.kv_heads + head;
        const int* const entries = at<int>(tables) + place * call.max_pages;
        const int slots = at<int>(counts)[place], sealed = at<int>(seals)[place];
        const int position = (int)at<i64>(call.positions)[row];
        const int* const list_row = at<int>(lists) + (call.selection_group * call.kv_heads + head) * (HEADER + call.selection_capacity);
#pragma unroll 1
        for (int i = threadIdx.x; i < min(pages, (int)call.max_pages); i += 32 * WARPS) cp_async_or_zeros<4>(table + i, entries + i, true);
        cp_async_commit();
        int first = 0, end = 0;
        if (selects) {
            const Choice now(a, list_row, slots, share, sealed);
            if (threadIdx.x == 0) c = now;
#pragma unroll 1
            for (int i = threadIdx.x; now.again && i < now.count; i += 32 * WARPS) list[HEADER + i] = list_row[HEADER + i];
            if (now.scored) first = now.range.x + TILE_PAGES * (own + blocks * (threadIdx.x / 32)), end = now.range.y;
        }
        if (threadIdx.x == 0) {
            shared.head = head, shared.row = row, shared.slots = slots - 1;
            shared.told = exchange.words(gang, 0), shared.turn_at = exchange.turn(gang);
        }
        best.clear();
        const int step = TILE_PAGES * blocks * WARPS;
        cp_async_wait<0>();
        __syncthreads();
        int ahead = first;
        const auto send = [&](Tile<D>& tile) {
            if (ahead < end) tile.fetch(shared.pools, table, ahead, end);
            cp_async_commit();
            ahead += step;
        };
        for (int n = 0; n < tiles; n++) send(own_tiles[n]);  // parameters are there before q is
#pragma unroll 4
        for (int later = ahead; later < end; later += step) Tile<D>::prefetch(shared.pools, table, later, end);
        {
            Prepared<D, WARPS> prepared;
            prepared.load_angles(call, position);
            wait_previous();
            const u32 turn = threadIdx.x == 0 ? next_turn(exchange.turn(gang)) : 0;
            prepared.load(call, head, row);
            if (threadIdx.x == 0) shared.turn = turn;
            if (threadIdx.x == 0 && selects) tell(exchange.words(gang, own) + TOLD - 2, 0, turn);
            prepared.store(call, shared);
        }
        if (selects && c.scored) weights.make(shared, call.group(), __int_as_float((int)a.reach));
        __syncthreads();
        if (selects && c.scored) {
            for (int n = 0; first < end; first += step, n = n + 1 == tiles ? 0 : n + 1) {
                if (tiles == 1) cp_async_wait<0>();
                else if (tiles == 2) cp_async_wait<1>();
                else cp_async_wait<2>();
                __syncwarp();
                own_tiles[n].score(weights, shared.pools, table, exchange.scores(gang), shared.turn, first, end);
                __syncwarp();
                send(own_tiles[n]);
            }
            cp_async_wait<0>();
        }
    }
    int count = shared.slots / PAGE + 1, found = 0;  // pages that are read, those of them that scores have found
    const u64* const arrival = exchange.words(gang, threadIdx.x) + TOLD - 2;  // of a block
    u64 come = own == 0 && selects && threadIdx.x < blocks ? hear(arrival) : word_of(0, shared.turn);
    if (selects) {
        const int begin = c.range.x, end = c.range.y;
        if (c.scored)
            found = best_pages<WARPS>(best, values, exchange.scores(gang) + begin, shared.turn, end - begin, c.free, begin,
                                      list + HEADER + begin);
        if (c.again) {
            count = c.count + (list[HEADER + c.count - 1] < c.total - 1);
            if (threadIdx.x == 0 && count > c.count) list[HEADER + c.count] = c.total - 1;
        } else if (!c.dense) {
#pragma unroll 1
            for (int page = threadIdx.x; page < begin; page += 32 * WARPS) list[HEADER + page] = page;
#pragma unroll 1
            for (int page = end + threadIdx.x; page < c.total; page += 32 * WARPS) list[HEADER + begin + found + page - end] = page;
            count = begin + found + c.total - end;
        }
    }
    const bool listed = selects && !c.dense;
    const int low = call.first_visible(shared.slots), first = listed ? 0 : low / PAGE;
    count -= first;
    const int used = min(blocks - 1, (count + 3) / 4);  // a page for each of a processor's four parts, before there is another block
    if (selects && own == 0) {
        while (turn_of(come) != shared.turn) come = hear(arrival);
        __syncthreads();
        keep_list(a, c, best, s, head, list, count, found);
    }
    cp_async_wait<0>();
    __syncthreads();  // rings take the place of what was needed for choosing
    if (own > used) return;
    if (threadIdx.x == 0) {
        shared.table = table, shared.list = listed ? list : nullptr, shared.first = first, shared.used = used, shared.range = own;
        shared.low = low, shared.stages = stages, shared.alone = 0, shared.count = count;
        shared.apart = warp_bytes<KIND, D>(stages) >= side_bytes<F16, D>();  // else there is no room for halves
        shared.begin = 0, shared.end = count;
    }
    __syncthreads();
    if (own == used) attend_newest<KIND, D, WARPS, true>(call, shared, at<i64>(call.positions)[shared.row]);
    else attend_range<KIND, D, WARPS, true>(call, shared, 0, 0);
    merge_share<D, WARPS>(call, shared);
}

#define CHOSEN(name, kind, depth, warps, blocks_of_processor) \
    extern "C" __global__ void __launch_bounds__(32 * warps, blocks_of_processor) name( \
        CALL_PARAMETERS SELECTION_ARGS(AS_PARAMETER) i64 stages, i64 room, i64 pages, i64 tiles, i64 memory, i64 blocks) \
    { \
        const Selection a{MAKE_CALL, SELECTION_ARGS(AS_VALUE)}; \
        choose_and_attend<kind, depth, warps>(a, (int)stages, (int)room, (int)pages, (int)tiles, {memory, blocks}); \
    }
CHOSEN(chosen_int4_64, INT4, 64, 8, 2)
CHOSEN(chosen_int4_128, INT4, 128, 8, 2)
CHOSEN(chosen_mixed_64, MIXED, 64, 8, 2)
#if __CUDA_ARCH__ >= 1200  // whose processors have shared memory for one such block
CHOSEN(chosen_mixed_128, MIXED, 128, 8, 1)
#else
CHOSEN(chosen_mixed_128, MIXED, 128, 8, 2)
#endif
