// What a row of queries reads.
#pragma once
#include "attention_call.cuh"

#define QUERY_BLOCK 64  // query tokens that one list of prefill is for (prefill_plan.py)
// What a chunk of a prompt reads, of one sequence and layer: for each KV head and block of queries a row of four int32, where its pages
// begin (in int32 from the first row on), how many there are, and the same of its single slots.
#define LIST_ROW 4
enum ChunkField { BLOCK_PLACE, PAGE_PLACE, WHOLE, CHUNK_FIELDS };  // of a sequence in `chunks` (device_batch.py)

__device__ __forceinline__ int sequence_of(const Call& call, int row)
{
    int s = 0;
    while (s + 1 < call.sequences() && call.first_row(s + 1) <= row) s++;
    return s;
}

// What a row reads, in parts of 32 slots: pages and single slots of a list, or all pages that it sees.
struct Reads {
    const int *pages, *columns;
    int first, page_count, column_count;

    __device__ __forceinline__ Reads(int low, int high)
        : pages(nullptr), columns(nullptr), first(low / PAGE), page_count((high + PAGE - 1) / PAGE - first), column_count(0) {}

    __device__ __forceinline__ Reads(const Call& call, int s, int head, int row, int low, int high) : Reads(low, high)
    {
        const int rows = call.rows(s);
        const i64 lists = call.prefill_lists ? at<i64>(call.prefill_lists)[s] : 0;
        if (rows == 1) {
            const int* list = call.list(s, head);
            if (list) pages = list + HEADER, page_count = list[COUNT], first = 0;
        } else if (lists) {
            const int blocks = (rows + QUERY_BLOCK - 1) / QUERY_BLOCK;
            const int* about = at<int>(lists) + LIST_ROW * (head * blocks + (row - call.first_row(s)) / QUERY_BLOCK);
            pages = at<int>(lists) + about[0], columns = at<int>(lists) + about[2], first = 0;
            page_count = about[1], column_count = about[3];
        }
    }
    __device__ __forceinline__ int parts() const { return page_count + (column_count + 31) / 32; }
    __device__ __forceinline__ int slot(int part, int lane) const  // -1: none
    {
        if (part < page_count) return (pages ? pages[part] : first + part) * PAGE + lane;
        const int i = (part - page_count) * 32 + lane;
        return i < column_count ? columns[i] : -1;
    }
};

// A part of what is read, 32 slots: a page, whose first slot and entry all threads have, or single tokens, a lane's own.
struct Part {
    int slot, entry;

    __device__ __forceinline__ void look(const Reads& reads, const int* table, int part)
    {
        slot = reads.slot(part, part < reads.page_count ? 0 : threadIdx.x % 32), entry = slot < 0 ? -1 : table[slot / PAGE];
    }
};
