// One call of cached_attention or select_pages: its arguments by name (attention_call.py), and how tokens and pages are addressed.
#pragma once
#include "page_pool.cuh"

#define CALL_ARGS(X) X(q) X(q_stride) X(k) X(k_stride) X(v) X(v_stride) X(cos) X(cos_stride) X(sin) X(out) X(out_stride) X(num_heads) \
    X(kv_heads) X(head_dim) X(rotary_dim) X(interleaved) X(scale_bits) X(window) X(layer) X(positions) X(row_starts) X(page_tables) \
    X(slot_counts) X(compensation) X(pools) X(max_pages) X(keys_rotated) X(prefill_lists) X(selections) X(selection_group) \
    X(selection_capacity) X(workspace) X(tokens_index) X(sequences_index) X(state)
#define AS_PARAMETER(name) i64 name,
#define AS_VALUE(name) name,
#define AS_FIELD(name) i64 name;
#define CALL_PARAMETERS CALL_ARGS(AS_PARAMETER)
#define MAKE_CALL Call{CALL_ARGS(AS_VALUE)}

enum Header { COUNT, SLOTS, AGE, INTERVAL, HEADER };  // of a list (selections.py)
#define ALL -1

struct Call {
    CALL_ARGS(AS_FIELD)

    __device__ __forceinline__ int group() const { return (int)((u32)num_heads / (u32)kv_heads); }  // of 64 bits it would be a call
    __device__ __forceinline__ float scale() const { return __int_as_float((int)scale_bits); }
    __device__ __forceinline__ int sequences() const { return (int)at<i64>(state)[sequences_index]; }
    __device__ __forceinline__ int tokens() const { return (int)at<i64>(state)[tokens_index]; }
    __device__ __forceinline__ int first_row(int s) const { return at<int>(row_starts)[s]; }
    __device__ __forceinline__ int rows(int s) const { return at<int>(row_starts)[s + 1] - at<int>(row_starts)[s]; }
    __device__ __forceinline__ int slots(int s, int head) const { return at<int>(at<i64>(slot_counts)[s])[layer * kv_heads + head]; }
    __device__ __forceinline__ const int* table(int s, int head) const
    {
        return at<int>(at<i64>(page_tables)[s]) + (layer * kv_heads + head) * max_pages;
    }
    __device__ __forceinline__ int first_visible(int slot) const { return window > 0 ? max(0, slot + 1 - (int)window) : 0; }
    __device__ __forceinline__ int* list_row(int s, int head) const {
        return at<int>(at<i64>(selections)[s]) + (selection_group * kv_heads + head) * (HEADER + selection_capacity);
    }
    // The list that a decode step of this layer reads; null where it reads everything.
    __device__ __forceinline__ const int* list(int s, int head) const {
        if (selection_group < 0 || at<i64>(selections)[s] == 0) return nullptr;
        const int* row = list_row(s, head);
        return row[COUNT] == ALL ? nullptr : row;
    }
    // Address of what the compensation token of a KV head is: float count, mean key, mean value (RazorAttention); 0 where nothing was
    // dropped.
    __device__ __forceinline__ const float* dropped(int s, int head) const {
        if (compensation == 0 || at<i64>(compensation)[s] == 0) return nullptr;
        const float* held = at<float>(at<i64>(compensation)[s]) + (layer * kv_heads + head) * (1 + 2 * head_dim);
        return held[0] > 0 ? held : nullptr;
    }
};

// A channel of a head on its way through rotary embedding (arXiv 2104.09864) at table row `position`: what is loaded, and what becomes of
// it. Apart, so that the loads of several channels are under way together; the angle is nothing that another kernel of a step writes.
struct Turn {
    float a, b, cosine, sine;

    __device__ __forceinline__ void load_angle(const Call& call, i64 position, int c)
    {
        const int half = (int)call.rotary_dim / 2, i = call.interleaved ? c / 2 : c < half ? c : c - half;
        const i64 row = position * call.cos_stride;
        cosine = 1, sine = 0;
        if (c < 2 * half) cosine = (at<float>(call.cos) + row)[i], sine = (at<float>(call.sin) + row)[i];
        sine = (call.interleaved ? c & 1 : c >= half) ? sine : -sine;
    }
    __device__ __forceinline__ void load_channel(const Call& call, const float* x, int c)
    {
        const int half = (int)call.rotary_dim / 2, other = call.interleaved ? c ^ 1 : c < half ? c + half : c - half;
        b = x[c], a = x[c < 2 * half ? other : c];
    }
    __device__ __forceinline__ void load(const Call& call, const float* x, i64 position, int c)
    {
        load_angle(call, position, c);
        load_channel(call, x, c);
    }
    __device__ __forceinline__ float value() const { return b * cosine + a * sine; }
};

__device__ __forceinline__ float rotated(const Call& call, const float* x, i64 position, int c)
{
    Turn turn;
    turn.load(call, x, position, c);
    return turn.value();
}

// Walsh-Hadamard rotation of `rows` rows of `depth` floats in shared memory, by all threads of the block: blocks of the largest power of
// two in depth. A barrier before, one after each stage.
__device__ __forceinline__ void hadamard(float* x, int rows, int depth, int stride) {
    const int size = depth & -depth;
    for (int span = 1; span < size; span *= 2) {
        __syncthreads();
        for (int n = threadIdx.x; n < rows * depth / 2; n += blockDim.x) {
            const int row = n / (depth / 2), i = n % (depth / 2);
            const int first = row * stride + i / span * 2 * span + i % span;
            const float a = x[first], b = x[first + span];
            x[first] = a + b, x[first + span] = a - b;
        }
    }
    __syncthreads();
    const float factor = rsqrtf((float)size);
    for (int n = threadIdx.x; n < rows * depth; n += blockDim.x) x[n / depth * stride + n % depth] *= factor;
    __syncthreads();
}

// Keys of one token, rotated and in shared memory, become a column of its page, values a row. By all threads of the block.
__device__ __forceinline__ void store_token(const Call& call, int s, int head, int row, int slot, const float* keys) {
    const int entry = call.table(s, head)[slot / PAGE], offset = slot % PAGE, depth = (int)call.head_dim, width = (depth + 31) / 32 * 32;
    const Page page(call.pools, entry);
    const float* values = at<float>(call.v) + row * call.v_stride + head * depth;
    const bool halves = page.kind(K_KIND) == F16;
    for (int c = threadIdx.x; c < depth; c += blockDim.x) {
        if (halves) {
            at<u16>(page.place(K))[c * PAGE + offset] = float_to_half(keys[c]);
            at<u16>(page.place(V))[offset * width + c] = float_to_half(values[c]);
        } else {
            at<float>(page.place(K))[c * PAGE + offset] = keys[c];
            at<float>(page.place(V))[offset * width + c] = values[c];
        }
    }
}
