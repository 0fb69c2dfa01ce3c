// Chunks of a prompt's keys, cut where these turn: what kernels of key_chunks.cu and choose_by_chunks.cu have in common.
#pragma once
#include "prefill_choice.cuh"

#define SIDE 4        // tokens on either side of a boundary (dhsa_chunks.py)
#define APART 8       // tokens around a boundary that holds no other
#define PAGE_CHUNKS 4 // that a page may begin, at most

#define CHUNK_ARGS(X) X(turns) X(states) X(taken) X(weights) X(starts) X(counts) X(keys) X(means) X(queries) X(scores) X(places) \
    X(page_places) X(budget) X(chunk) X(turn)
#define CHUNK_PARAMETERS CHUNK_ARGS(AS_PARAMETER) i64 unused
#define MAKE_CHUNKS Chunks{CHUNK_ARGS(AS_VALUE)}

// KV heads that hold as many tokens are cut together, as the first of them; others by themselves.
struct Together {
    int first, count;

    __device__ __forceinline__ Together(const Call& call, int s, int head) : first(0), count((int)call.kv_heads)
    {
        for (int h = 1; h < call.kv_heads; h++)
            if (call.slots(s, h) != call.slots(s, 0)) first = head, count = 1;
    }
};

struct Chunks {
    CHUNK_ARGS(AS_FIELD)

    __device__ __forceinline__ i64 page(const QueryBlock& here, int head) const { return head * page_places + here.page_place; }
    __device__ __forceinline__ int* count(const QueryBlock& here, int head) const
    {
        return at<int>(counts) + head * places + here.place - here.first / QUERY_BLOCK;
    }
    __device__ __forceinline__ const int* begins(const QueryBlock& here, int head) const
    {
        return at<int>(starts) + page(here, head) * PAGE_CHUNKS;
    }
};
