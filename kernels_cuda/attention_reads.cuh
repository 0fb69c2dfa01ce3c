// What a row of queries reads.
#pragma once
#include "attention_call.cuh"

#define QUERY_BLOCK 64  // query tokens that one list of prefill is for (prefill_plan.py)

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

    __device__ __forceinline__ Reads(const Call& call, int s, int head, int row, int low, int high)
        : pages(nullptr), columns(nullptr), column_count(0)
    {
        first = low / PAGE, page_count = (high + PAGE - 1) / PAGE - first;
        const int rows = call.rows(s);
        const i64 lists = call.prefill_lists ? at<i64>(call.prefill_lists)[s] : 0;
        if (rows == 1) {
            const int* list = call.list(s, head);
            if (list) pages = list + HEADER, page_count = list[COUNT], first = 0;
        } else if (lists) {
            const int blocks = (rows + QUERY_BLOCK - 1) / QUERY_BLOCK;
            const int* starts = at<int>(lists) + 2 * (head * blocks + (row - call.first_row(s)) / QUERY_BLOCK);
            pages = at<int>(lists) + starts[0], columns = at<int>(lists) + starts[1], first = 0;
            page_count = starts[1] - starts[0], column_count = starts[2] - starts[1];
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
