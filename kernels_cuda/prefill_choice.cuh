// What a block of 64 queries of a prompt reads of a KV head: pages chosen by weight, as the list that attention reads. By a block of
// CHOICE_THREADS threads, whose shared memory holds a weight and a mark for each page that the queries see.
#pragma once
#include "attention_reads.cuh"

#define CHOICE_THREADS 256
#define CHOICE_WARPS (CHOICE_THREADS / 32)
#define TAKEN (-1.0f)  // weight of a page that is read anyhow
#define CHOICE_ARGS(X) X(chunks) X(stats) X(columns) X(sink) X(recent)  // columns: single keys of a list, at most
#define CHOICE_PARAMETERS CHOICE_ARGS(AS_PARAMETER)
#define MAKE_CHOICE Choice{CHOICE_ARGS(AS_VALUE)}

struct Choice {
    CHOICE_ARGS(AS_FIELD)

    __device__ __forceinline__ i64 of(int s, int field) const { return at<i64>(chunks)[s * CHUNK_FIELDS + field]; }
};

// Where block `block` of a sequence's new tokens stands, for one KV head. Blocks and pages of all sequences that have lists are numbered
// on: place, page_place.
struct QueryBlock {
    int blocks, past, first, rows, pages, near, place, page_place;
    bool there, whole;

    // there: the sequence has lists, and so many blocks
    __device__ __forceinline__ QueryBlock(const Call& call, const Choice& choice, int s, int head, int block) : there(false)
    {
        if (s >= call.sequences() || call.prefill_lists == 0 || at<i64>(call.prefill_lists)[s] == 0) return;
        const int n = call.rows(s);
        blocks = (n + QUERY_BLOCK - 1) / QUERY_BLOCK, past = call.slots(s, head) - n, first = block * QUERY_BLOCK;
        if (block >= blocks) return;
        there = true, rows = min(QUERY_BLOCK, n - first), pages = (past + first + rows + PAGE - 1) / PAGE;
        near = max(0, (past + first) / PAGE - (int)choice.recent), whole = block >= blocks - (int)choice.of(s, WHOLE);
        place = (int)choice.of(s, BLOCK_PLACE) + block, page_place = (int)choice.of(s, PAGE_PLACE);
    }
    // a page that is read anyhow (prefill_plan.py, forced)
    __device__ __forceinline__ bool kept(const Choice& choice, int page) const { return whole || page < choice.sink || page >= near; }
};

struct Totals { float sums[CHOICE_WARPS], counts[CHOICE_WARPS]; };

// Sums over the block, the same for all its threads.
__device__ __forceinline__ float2 block_sums(Totals& room, float x, float y)
{
    x = warp_sum(x), y = warp_sum(y);
    __syncthreads();
    if (threadIdx.x % 32 == 0) room.sums[threadIdx.x / 32] = x, room.counts[threadIdx.x / 32] = y;
    __syncthreads();
    float2 found = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < CHOICE_WARPS; w++) found.x += room.sums[w], found.y += room.counts[w];
    return found;
}

__device__ __forceinline__ float block_max(Totals& room, float x)
{
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) room.sums[threadIdx.x / 32] = x;
    __syncthreads();
    float found = room.sums[0];
#pragma unroll
    for (int w = 1; w < CHOICE_WARPS; w++) found = fmaxf(found, room.sums[w]);
    return found;
}

// Which thread before this one, in all its block, has `mine` set; `all` gets how many do.
__device__ __forceinline__ int block_rank(Totals& room, bool mine, int& all)
{
    const u32 votes = __ballot_sync(FULL_WARP, mine);
    __syncthreads();
    if (threadIdx.x % 32 == 0) room.counts[threadIdx.x / 32] = (float)__popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << threadIdx.x % 32) - 1));
    all = 0;
#pragma unroll
    for (int w = 0; w < CHOICE_WARPS; w++) {
        before += w < threadIdx.x / 32 ? (int)room.counts[w] : 0;
        all += (int)room.counts[w];
    }
    return before;
}

// The sum of `mine` over the threads before this one, in all its block; `all` gets that over the block.
__device__ __forceinline__ int block_prefix(Totals& room, int mine, int& all)
{
    int before = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(FULL_WARP, before, step);
        if (threadIdx.x % 32 >= step) before += other;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 31) room.counts[threadIdx.x / 32] = (float)before;
    __syncthreads();
    before -= mine, all = 0;
#pragma unroll
    for (int w = 0; w < CHOICE_WARPS; w++) {
        before += w < threadIdx.x / 32 ? (int)room.counts[w] : 0;
        all += (int)room.counts[w];
    }
    return before;
}

// Mark the pages above a limit, and of those that equal it, from the first on, as many as pick() needs.
template <typename Mark>
__device__ __forceinline__ void mark_heaviest(Totals& room, const float* weights, const Mark& mark, int pages, float limit, float before,
                                              float target, int least, int most)
{
    float sum = 0, count = 0;
    for (int p = threadIdx.x; p < pages; p += CHOICE_THREADS)
        if (weights[p] > limit) sum += weights[p], count++, mark(p);
    const float2 above = block_sums(room, sum, count);
    const float missing = target - before - above.x;
    float left = missing <= 0 ? 0 : limit > 0 ? fminf(ceilf(missing / limit), (float)pages) : (float)pages;
    left = fminf(fmaxf(left, least - above.y), most - above.y);
    int passed = 0;
    for (int from = 0; from < pages && passed < left; from += CHOICE_THREADS) {
        const int p = from + threadIdx.x;
        const bool equal = p < pages && weights[p] == limit;
        int all;
        const int rank = passed + block_rank(room, equal, all);
        if (equal && rank < left) mark(p);
        passed += all;
    }
    __syncthreads();
}

// Mark as few pages as are needed, the heaviest first and of equals the earlier, until with `before` their weights reach `target`; not
// fewer than `least`, nor, whatever else, more than `most`. Pages of weight TAKEN do not count. The limit that divides them is found bit by
// bit: floats that are not negative are ordered as their bits are. mark(page) is called by some thread of the block.
template <typename Mark>
__device__ __forceinline__ void pick(Totals& room, const float* weights, const Mark& mark, int pages, float before, float target,
                                     int least, int most)
{
    if (most <= 0) return;
    u32 bits = 0;
    for (int bit = 30; bit >= 0; bit--) {
        const float limit = __int_as_float((int)(bits | 1u << bit));
        float sum = 0, count = 0;
        for (int p = threadIdx.x; p < pages; p += CHOICE_THREADS)
            if (weights[p] >= limit) sum += weights[p], count++;
        const float2 found = block_sums(room, sum, count);
        if ((before + found.x >= target && found.y >= least) || found.y >= most) bits |= 1u << bit;
    }
    mark_heaviest(room, weights, mark, pages, __int_as_float((int)bits), before, target, least, most);
}

__device__ __forceinline__ void pick(Totals& room, const float* weights, u8* marks, int pages, float before, float target, int least,
                                     int most)
{
    pick(room, weights, [&](int p) { marks[p] = 1; }, pages, before, target, least, most);
}

// Marked pages as the list of a KV head and block of queries, and behind them single keys of the others: bit t of keys[p] is key t of
// page p; null: none. Counts the pairs of query and key that the list reads, and all that are seen.
__device__ __forceinline__ void write_list(const Call& call, const Choice& choice, const QueryBlock& here, Totals& room, int s, int head,
                                           const u8* marks, const u32* keys = nullptr)
{
    const int rows = (int)call.kv_heads * here.blocks, row = head * here.blocks + here.first / QUERY_BLOCK;
    const int begin = LIST_ROW * rows + row * (int)(call.max_pages + choice.columns), end = here.past + here.first + here.rows;
    int* lists = at<int>(at<i64>(call.prefill_lists)[s]);
    int found = 0, alone = 0;
    float pairs = 0;
    for (int from = 0; from < here.pages; from += CHOICE_THREADS) {
        const int p = from + threadIdx.x;
        const bool mine = p < here.pages && marks[p];
        int all;
        const int rank = found + block_rank(room, mine, all);
        if (mine) {
            lists[begin + rank] = p;
            const int over = (p + 1) * PAGE - (here.past + here.first + 1);  // keys of the page that the block's first query does not see
            pairs += over <= 0 ? here.rows * PAGE : 0;
            for (int r = 0; over > 0 && r < here.rows; r++) pairs += max(0, min(PAGE, PAGE - over + r));
        }
        found += all;
    }
    const int columns = begin + found;
    for (int from = 0; keys && from < here.pages; from += CHOICE_THREADS) {
        const int p = from + threadIdx.x, seen = end - p * PAGE;  // keys of the page
        u32 word = p < here.pages && !marks[p] ? keys[p] : 0;
        if (seen < PAGE) word &= seen > 0 ? (1u << seen) - 1 : 0;
        int all, rank = alone + block_prefix(room, __popc(word), all);
        for (; word && rank < choice.columns; word &= word - 1, rank++) {
            const int key = p * PAGE + __ffs(word) - 1;
            lists[columns + rank] = key;
            pairs += min(here.rows, end - key);
        }
        alone += all;
    }
    pairs = block_sums(room, pairs, 0).x;
    if (threadIdx.x) return;
    lists[LIST_ROW * row] = begin, lists[LIST_ROW * row + 1] = found;
    lists[LIST_ROW * row + 2] = columns, lists[LIST_ROW * row + 3] = min(alone, (int)choice.columns);
    if (choice.stats == 0) return;
    u64* stats = at<u64>(choice.stats) + 2 * call.layer;
    atomicAdd(stats, (u64)pairs);
    atomicAdd(stats + 1, (u64)(here.past + here.first) * here.rows + here.rows * (here.rows + 1) / 2);
}
