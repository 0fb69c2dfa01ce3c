// entries [pages] int32 -> k [pages][head_dim][32], v [pages][32][head_dim] float32.  Grid: a block each page, up to the bucket's.
#include "page_values.cuh"

KERNEL read_pages(i64 pools, i64 entries, i64 k, i64 v, i64 head_dim, i64 count_index, i64 state)
{
    wait_previous();
    const int depth = (int)head_dim;
    if (blockIdx.x >= at<i64>(state)[count_index]) return;
    const Page page(pools, at<int>(entries)[blockIdx.x]);
    float* keys = at<float>(k) + (i64)blockIdx.x * depth * PAGE;
    float* values = at<float>(v) + (i64)blockIdx.x * depth * PAGE;
    for (int n = threadIdx.x; n < depth * PAGE; n += blockDim.x) {
        keys[n] = key_at(page, depth, n / PAGE, n % PAGE);
        values[n] = value_at(page, depth, n / depth, n % depth);
    }
}
