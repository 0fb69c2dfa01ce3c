// Queries of a prompt whose true weights say what others read: the last ones of each segment, or of all, `apart` tokens one from the next,
// which is 1 where there are segments. What kernels of sampled_weights.cu and choose_by_samples.cu have in common.
#pragma once
#include "prefill_choice.cuh"

#define SAMPLE_ARGS(X) X(arranged) X(partials) X(totals) X(page_sums) X(band_sums) X(means) X(newest) X(estimates) X(flags) X(maps) \
    X(query_places) X(page_places) X(tile_places) X(tiles) X(most_rows) X(sampled) X(apart) X(segment) X(part_down) X(part_across) \
    X(fewest) X(below)
#define SAMPLE_PARAMETERS SAMPLE_ARGS(AS_PARAMETER)
#define MAKE_SAMPLES Samples{SAMPLE_ARGS(AS_VALUE)}

// segment 0: all queries of a sequence are one
struct Samples {
    SAMPLE_ARGS(AS_FIELD)

    __device__ __forceinline__ int span(int n) const { return segment ? (int)segment : n; }
    __device__ __forceinline__ int count(int n) const { return (n + span(n) - 1) / span(n) * (int)sampled; }  // rows of a head
    // Sampled query i of n; -1 where the segment, the last one, has not so many.
    __device__ __forceinline__ int token(int i, int n) const
    {
        const int begin = i / (int)sampled * span(n);
        const int at = min(begin + span(n), n) - 1 - ((int)sampled - 1 - i % (int)sampled) * (int)apart;
        return at < begin ? -1 : at;
    }
    // The first tile of 16 rows of a sequence; one has `tiles` a block of queries, or, without segments, in all.
    __device__ __forceinline__ i64 tile(const Call& call, const QueryBlock& start, int s, int head) const
    {
        int place = segment ? start.place : 0;
        for (int i = 0; i < s && !segment; i++) place += at<i64>(call.prefill_lists)[i] != 0;
        return (head * tile_places + place) * tiles;
    }
    // Partial results of a row, counted from the first of a piece on.
    __device__ __forceinline__ uint2* row(const QueryBlock& start, int head, int row, int pages) const
    {
        return at<uint2>(partials) + (head * page_places + start.page_place) * most_rows + (i64)row * pages;
    }
    __device__ __forceinline__ i64 page(const QueryBlock& start, int head) const { return head * page_places + start.page_place; }
    __device__ __forceinline__ float* map(const Call& call, const QueryBlock& start, int head) const
    {
        return at<float>(estimates) + (head * query_places + start.place) * call.max_pages;
    }
    __device__ __forceinline__ u32* words(const Call& call, int head, int place) const
    {
        return at<u32>(maps) + (head * query_places + place) * ((call.max_pages + 31) / 32);
    }
};

// How many of the sampled queries of n, of 2^21 at most, reach how far.
struct Reach {
    int n, span, sampled, last, live;
    float inverse;

    __device__ __forceinline__ Reach(const Samples& samples, int n)
        : n(n), span(samples.span(n)), sampled((int)samples.sampled), last((n + span - 1) / span - 1), inverse(1.0f / span)
    {
        live = before(n);
    }
    // that come before token x
    __device__ __forceinline__ int before(int x) const
    {
        const int own = min((int)((x + 0.5f) * inverse), last), begin = own * span;
        return own * sampled + max(0, x - max(min(begin + span, n) - sampled, begin));
    }
    // How many there are for each that is not before token x.
    __device__ __forceinline__ float share(int x) const { return __fdividef((float)live, (float)(live - before(x))); }
};
