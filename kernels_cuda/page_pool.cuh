// Pools of pages: a row of int64 for each, as page_pool.py writes them, and how a page's bytes are found. Layouts of pages:
// page_formats.py.
#pragma once
#include "halves.cuh"

#define PAGE 32
#define POOLS 4

enum Field { K, K_BYTES, K_PARAMS, K_PARAM_BYTES, V, V_BYTES, V_PARAMS, V_PARAM_BYTES, K_KIND, K_EXPAND, K_PACK, V_KIND, V_EXPAND, V_PACK,
             K_GAP, K_ROW, V_GAP, V_BLOCK, K_AXIS, V_QUANTISED, GROUPS, SEPARATED, SYMMETRIC, K_LEVELS, V_LEVELS, K_TWO_PLANES, K_THRESHOLD,
             K_REFRESH, FIELDS };
enum Axis { NO_AXIS, BY_ROW, BY_TOKEN };
enum Kind { INT2 = 2, INT3 = 3, INT4 = 4, INT8 = 8, F16 = 16, DELTA = 17, F32 = 32 };  // bits, but for deltas

struct Page {
    const i64* pool;
    i64 number;
    __device__ __forceinline__ Page(const i64* table, int entry) : pool(table + (entry & (POOLS - 1)) * FIELDS), number(entry >> 2) {}
    __device__ __forceinline__ Page(i64 pools, int entry) : pool(at<i64>(pools) + (entry & (POOLS - 1)) * FIELDS), number(entry >> 2) {}
    // address of codes or parameters
    __device__ __forceinline__ i64 place(int field) const { return pool[field] + number * pool[field + 1]; }
    __device__ __forceinline__ int kind(int field) const { return (int)pool[field]; }
};
