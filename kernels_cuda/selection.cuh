// A call of select_pages: which pages scores decide about, and from scores to lists (selections in attention_call.cuh).
#pragma once
#include "attention_merge.cuh"
#include "top_pages.cuh"

#define LONGEST 16     // steps that a list serves at most
enum Score { BOUND, MASS, RECENCY, RANDOM, PEAK = 20 };
enum Combine { ALONE, LAYER, BEST };
enum Stat { SPARSE, DENSE, READ, HELD, REUSED, STATS };

#define SELECTION_ARGS(X) X(sealed) X(index) X(indexed) X(index_width) X(scores) X(shares) X(stats) X(score) X(combine) X(budget) \
    X(fraction) X(recent) X(reach) X(reuse) X(block) X(softmax)

struct Selection {
    Call call;
    SELECTION_ARGS(AS_FIELD)

    __device__ __forceinline__ int total(int slots) const { return (slots + PAGE - 1) / PAGE; }
    __device__ __forceinline__ float* scores_of(int s, int head) const {
        return at<float>(scores) + (s * call.kv_heads + head) * call.max_pages;
    }
    __device__ __forceinline__ u16* index_row(int s, int head, int page) const {
        return at<u16>(at<i64>(index)[s]) + ((call.layer * call.kv_heads + head) * call.max_pages + page) * index_width;
    }
    __device__ __forceinline__ int* indexed_of(int s, int head) const {
        return at<int>(at<i64>(indexed)[s]) + call.layer * call.kv_heads + head;
    }
    __device__ __forceinline__ int sealed_of(int s, int head) const {
        return at<int>(at<i64>(sealed)[s])[call.layer * call.kv_heads + head];
    }
    // The pages that scores decide about: between the first page, or block, and the recent ones.
    __device__ __forceinline__ int2 candidates(int s, int head, int pages) const {
        const int known = sealed_of(s, head), each = max(1, (int)block);
        int last = pages - (int)recent;
        if (score == BOUND && (known > 1 || index_width < 2 * call.head_dim)) last = min(last, known);
        last = max(1, last / each * each);
        return make_int2(min(each, last), last);
    }
    __device__ __forceinline__ int wanted(int s, int head, int slots) const {
        const float share = at<float>(shares)[call.layer * call.kv_heads + head];
        if (share < 0) return 1 << 30;
        return (int)ceilf(share * fmaxf((float)budget, __int_as_float((int)fraction) * (float)slots) / (float)PAGE);
    }
    __device__ __forceinline__ bool still_good(int s, int head) const {
        const int* row = call.list_row(s, head);
        return row[COUNT] >= 1 && row[SLOTS] + row[AGE] + 1 == call.slots(s, head) && row[AGE] + 1 < row[INTERVAL];
    }
    __device__ __forceinline__ bool all_still_good(int s) const {
        bool good = true;
        for (int head = 0; head < call.kv_heads; head++) good = good && still_good(s, head);
        return good;
    }
    // Whether a head's pages are to be scored.
    __device__ __forceinline__ bool scoring(int s, int head) const {
        if (combine == ALONE) return !still_good(s, head) && wanted(s, head, call.slots(s, head)) < total(call.slots(s, head));
        bool some = false;
        for (int other = 0; other < call.kv_heads; other++)
            some = some || wanted(s, other, call.slots(s, other)) < total(call.slots(s, other));
        return some && !all_still_good(s);
    }
};

// Make one head's list anew, or use it again. All threads of a block.
__device__ __forceinline__ void choose(const Selection& a, Choosing& shared, int s, int head, bool again)
{
    const int slots = a.call.slots(s, head), total = a.total(slots);
    int* row = a.call.list_row(s, head);
    __syncthreads();
    const int count = row[COUNT], age = row[AGE], interval = row[INTERVAL];
    const bool follows = count >= 0 && row[SLOTS] + age + 1 == slots;
    __syncthreads();
    int reads = total;
    bool dense = false;
    if (again) {  // a list that is still good gets the page begun since
        const bool begun = row[HEADER + count - 1] < total - 1;
        __syncthreads();
        if (threadIdx.x == 0) {
            row[AGE] = age + 1;
            if (begun) row[HEADER + count] = total - 1, row[COUNT] = count + 1;
        }
        reads = count + begun;
    } else {
        const int each = max(1, (int)a.block), wanted = a.wanted(s, head, slots);
        const int2 range = a.candidates(s, head, total);
        const int free = max(wanted - (total - range.y) - range.x, 0) / each * each;
        dense = wanted >= total || free >= range.y - range.x || total - range.y + range.x + free > a.call.selection_capacity - 2;
        if (dense) {
            if (threadIdx.x == 0) row[COUNT] = ALL, row[SLOTS] = slots, row[AGE] = 0, row[INTERVAL] = 1;
        } else {
            const float reuse = __int_as_float((int)a.reuse);
            int kept;
            const int found = free ? top_pages(shared, a.scores_of(s, head), range.x, range.y, free, row + HEADER + range.x, row + HEADER,
                                               reuse > 0 && follows ? count : 0, kept) : 0;
            if (!free) kept = 0;
            for (int page = threadIdx.x; page < range.x; page += SELECT_THREADS) row[HEADER + page] = page;
            for (int page = range.y + threadIdx.x; page < total; page += SELECT_THREADS)
                row[HEADER + range.x + found + page - range.y] = page;
            reads = range.x + found + total - range.y;
            if (threadIdx.x == 0) {
                int next = 1;
                if (reuse > 0 && follows)
                    next = (float)kept / (float)max(found, 1) >= reuse ? min(2 * interval, LONGEST) : max(interval / 2, 1);
                row[COUNT] = reads, row[SLOTS] = slots, row[AGE] = 0, row[INTERVAL] = next;
            }
        }
    }
    if (a.stats && threadIdx.x == 0) {
        u64* stats = at<u64>(a.stats) + STATS * a.call.layer;
        atomicAdd(stats + (dense ? DENSE : SPARSE), 1ull), atomicAdd(stats + READ, (u64)reads), atomicAdd(stats + HELD, (u64)total);
        atomicAdd(stats + REUSED, (u64)again);
    }
}
