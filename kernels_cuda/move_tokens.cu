// Tokens of pages of floats to lower places, what stays after an eviction: keys are columns of their pages, values rows.
//   starts [parts + 1], sources, targets [tokens] int32: 32 * page + slot of what moves. A part is tokens of one KV head in the order of
//   the text, each of which goes to an earlier slot: so that 32 at a time, all read before one is written, overwrite nothing that is still
//   to move.
//   Grid: a block for each part, 256 threads.
// And tokens that change places with each other (permute_*): a part is at most MOST_TOKENS, a block has 32 channels of it.
//   Grid: (parts, blocks of channels), 256 threads.
#include "page_pool.cuh"

#define MOST_DEPTH 256
#define MOST_TOKENS 256

// `stride`, `step`: items of a page from a token to the next, and from a channel to the next.
template <class Item>
__device__ __forceinline__ void move(Item* held, Item* pages, i64 page_items, int stride, int step, int depth, const int* sources,
                                     const int* targets, int count)
{
    for (int n = threadIdx.x; n < PAGE * depth; n += blockDim.x) {
        const int t = step == 1 ? n / depth : n % PAGE, c = step == 1 ? n % depth : n / PAGE;
        if (t < count) held[n] = pages[sources[t] / PAGE * page_items + sources[t] % PAGE * stride + c * step];
    }
    __syncthreads();
    for (int n = threadIdx.x; n < PAGE * depth; n += blockDim.x) {
        const int t = step == 1 ? n / depth : n % PAGE, c = step == 1 ? n % depth : n / PAGE;
        if (t < count) pages[targets[t] / PAGE * page_items + targets[t] % PAGE * stride + c * step] = held[n];
    }
    __syncthreads();
}

template <class Item> __device__ __forceinline__ void move_part(i64 k, i64 v, i64 starts, i64 sources, i64 targets, i64 head_dim)
{
    __shared__ Item held[PAGE * MOST_DEPTH];
    __shared__ int from[PAGE], to[PAGE];
    wait_previous();
    const int depth = (int)head_dim, width = (depth + 31) / 32 * 32, last = at<int>(starts)[blockIdx.x + 1];
    for (int first = at<int>(starts)[blockIdx.x]; first < last; first += PAGE) {
        const int count = min(PAGE, last - first);
        if (threadIdx.x < count) {
            from[threadIdx.x] = at<int>(sources)[first + threadIdx.x];
            to[threadIdx.x] = at<int>(targets)[first + threadIdx.x];
        }
        __syncthreads();
        move(held, at<Item>(k), (i64)depth * PAGE, 1, PAGE, depth, from, to, count);
        move(held, at<Item>(v), (i64)width * PAGE, width, 1, width, from, to, count);
    }
}

KERNEL move_halves(i64 k, i64 v, i64 starts, i64 sources, i64 targets, i64 head_dim)
{
    move_part<u16>(k, v, starts, sources, targets, head_dim);
}
KERNEL move_floats(i64 k, i64 v, i64 starts, i64 sources, i64 targets, i64 head_dim)
{
    move_part<u32>(k, v, starts, sources, targets, head_dim);
}

template <class Item> __device__ __forceinline__ void permute_part(i64 k, i64 v, i64 starts, i64 sources, i64 targets, i64 head_dim)
{
    __shared__ Item held[32 * MOST_TOKENS];
    wait_previous();
    const int depth = (int)head_dim, width = (depth + 31) / 32 * 32, channel = 32 * blockIdx.y, first = at<int>(starts)[blockIdx.x];
    const int count = at<int>(starts)[blockIdx.x + 1] - first, *from = at<int>(sources) + first, *to = at<int>(targets) + first;
    auto key = [&](int place, int c) { return at<Item>(k) + ((i64)(place / PAGE) * depth + channel + c) * PAGE + place % PAGE; };
    auto value = [&](int place, int c) { return at<Item>(v) + (i64)place * width + channel + c; };
    const int channels = min(32, depth - channel);
    for (int n = threadIdx.x; n < channels * count; n += blockDim.x) held[n] = *key(from[n % count], n / count);
    __syncthreads();
    for (int n = threadIdx.x; n < channels * count; n += blockDim.x) *key(to[n % count], n / count) = held[n];
    __syncthreads();
    for (int n = threadIdx.x; n < 32 * count; n += blockDim.x) held[n] = *value(from[n / 32], n % 32);
    __syncthreads();
    for (int n = threadIdx.x; n < 32 * count; n += blockDim.x) *value(to[n / 32], n % 32) = held[n];
}

KERNEL permute_halves(i64 k, i64 v, i64 starts, i64 sources, i64 targets, i64 head_dim)
{
    permute_part<u16>(k, v, starts, sources, targets, head_dim);
}
KERNEL permute_floats(i64 k, i64 v, i64 starts, i64 sources, i64 targets, i64 head_dim)
{
    permute_part<u32>(k, v, starts, sources, targets, head_dim);
}
