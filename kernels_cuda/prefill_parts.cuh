// What a block of prefill attention reads, 64 cached tokens at a time, on its way to shared memory.
#pragma once
#include "attention_compensation.cuh"
#include "attention_reads.cuh"

#define ROWS 128
#define KEYS 64
#define WARPS 4
#define THREADS (32 * WARPS)
#define TOGETHER 4  // loads of single keys that are under way
#define HIDDEN (1 << 30)

template <int D> struct Tiles {
    u8 queries[ROWS * D * 2], keys[2][D * 64], values[2][D * 64];
    int rows[ROWS];       // slot of each row's token
    int slots[2][KEYS];   // what stands in each column, of this step and the next; HIDDEN: nothing that may be seen
};

// By all threads; `half`: which half of a step's keys the part is, so that other threads expand the other half.
template <int D> __device__ __forceinline__ void part_keys(const Call& call, const Part& part, bool whole, int half, u8* keys, int* slots)
{
    const int t = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp == 0) slots[t] = part.entry < 0 ? HIDDEN : whole ? part.slot + t : part.slot;
    if (whole && part.entry < 0) return;
    const Page page(call.pools, max(part.entry, 0));
    const bool halves = page.kind(K_KIND) == F16;
    const i64 k = page.place(K);
    if (whole && halves) {
#pragma unroll
        for (int i = 0; i < 4 * D / THREADS; i++) {
            const int n = THREADS * i + threadIdx.x;
            cp_async16(keys + key_piece<D>(n / 4, n % 4), at<u8>(k + 16 * n));
        }
    } else if (whole) {
        const int unit = threadIdx.x - half * D / 2;
        if (unit >= 0 && unit < D / 2) expand_unit<D>(page, unit, keys, nullptr);
    } else if (halves) {
        const i64 from = k + 2 * (part.slot % PAGE);
#pragma unroll 1
        for (int first = warp; first < D; first += TOGETHER * WARPS) {
            u16 x[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) x[i] = part.entry < 0 ? 0 : at<u16>(from)[(first + WARPS * i) * PAGE];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) reinterpret_cast<u16*>(keys + key_piece<D>(first + WARPS * i, t / 8))[t % 8] = x[i];
        }
    } else {
#pragma unroll 1
        for (int c = warp; c < D; c += WARPS) {
            const u16 x = part.entry < 0 ? 0 : float_to_half(key_at(page, D, c, part.slot % PAGE));
            reinterpret_cast<u16*>(keys + key_piece<D>(c, t / 8))[t % 8] = x;
        }
    }
}

// The same of values, zeros from slot `high` on (never written, they may be no numbers).
template <int D> __device__ __forceinline__ void part_values(const Call& call, const Part& part, bool whole, int half, int high, u8* values)
{
    const int t = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool there = part.entry >= 0;
    const Page page(call.pools, max(part.entry, 0));
    const i64 v = page.place(V);
    if (page.kind(V_KIND) == F16 || whole && !there) {
#pragma unroll
        for (int i = 0; i < 4 * D / THREADS; i++) {
            const int n = THREADS * i + threadIdx.x;
            const int token = whole ? n / (D / 8) : t, piece = whole ? n % (D / 8) : WARPS * i + warp;
            const int from = whole ? token : part.slot % PAGE;
            cp_async16_or_zeros(values + value_piece<D>(token, piece), at<u8>(v + 2 * D * from + 16 * piece),
                                there && (!whole || part.slot + token < high));
        }
    } else if (whole) {
        const int unit = threadIdx.x - half * D / 2;
        if (unit >= 0 && unit < D / 2) expand_unit<D>(page, D / 2 + unit, nullptr, values);
    } else {
#pragma unroll 1
        for (int c = warp; c < D; c += WARPS) {
            const u16 x = there ? float_to_half(value_at(page, D, part.slot % PAGE, c)) : 0;
            reinterpret_cast<u16*>(values + value_piece<D>(t, c / 8))[c % 8] = x;
        }
    }
}

// Pages that a list leaves out, as tokens: their mean keys and mean values (attention_tail.cu) lie as pages of halves do, 32 pages of all
// sequences that have lists to one of these. A block reads those before its first row's page.
#define MEANS_BYTES 128  // of a channel: mean keys, then mean values
struct LeftOut {
    const Reads& reads;
    const int* table;
    i64 means, apart;    // where the first mean page lies; bytes from one to the next
    int first, end, count;  // the first mean page's first page, which may be another sequence's; pages; mean pages

    __device__ __forceinline__ LeftOut(const Call& call, const Reads& reads, const int* table, i64 means, int page_place, int head, int end)
        : reads(reads), table(table), apart(MEANS_BYTES * call.kv_heads * call.head_dim), first(-(page_place % PAGE)), end(end),
          count((end - first + PAGE - 1) / PAGE)
    {
        this->means = means + (page_place / PAGE * call.kv_heads + head) * MEANS_BYTES * call.head_dim;
    }
    __device__ __forceinline__ i64 place(int index) const { return means + index * apart; }
    // The page that each lane has of mean page `index`, as a token in the page's first slot that is there if the page is left out.
    __device__ __forceinline__ void look(Part& part, int index) const
    {
        const int page = first + PAGE * index + (int)threadIdx.x % 32, named = rank_of(reads.pages, reads.page_count, page);
        part.slot = page * PAGE, part.entry = page >= 0 && page < end ? table[page] : -1;
        if (named < reads.page_count && reads.pages[named] == page) part.entry = -1;
        const int alone = rank_of(reads.columns, reads.column_count, part.slot);
        if (alone < reads.column_count && reads.columns[alone] < part.slot + PAGE) part.entry = -1;
    }
    static __device__ __forceinline__ int rank_of(const int* ascending, int count, int x)  // how many are less
    {
        int low = 0;
        while (low < count) {
            const int middle = (low + count) / 2;
            if (ascending[middle] < x) low = middle + 1;
            else count = middle;
        }
        return low;
    }
};

// A mean page's part of a step, as part_keys and part_values have it.
template <int D> __device__ __forceinline__ void mean_keys(const Part& part, i64 from, u8* keys, int* slots)
{
    if (threadIdx.x < 32) slots[threadIdx.x] = part.entry < 0 ? HIDDEN : part.slot;
#pragma unroll
    for (int i = 0; i < 4 * D / THREADS; i++) {
        const int n = THREADS * i + threadIdx.x;
        cp_async16(keys + key_piece<D>(n / 4, n % 4), at<u8>(from + 16 * n));
    }
}

template <int D> __device__ __forceinline__ void mean_values(const Part& part, i64 from, u8* values)
{
    from += MEANS_BYTES / 2 * D;
#pragma unroll
    for (int i = 0; i < 4 * D / THREADS; i++) {
        const int n = THREADS * i + threadIdx.x, page = n / (D / 8);
        cp_async16_or_zeros(values + value_piece<D>(page, n % (D / 8)), at<u8>(from + 16 * n),
                            __shfl_sync(FULL_WARP, part.entry, page) >= 0);
    }
}
