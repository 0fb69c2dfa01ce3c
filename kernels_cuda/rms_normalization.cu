// Root-mean-square normalisation of every row, or of every group of a row (a head). All float32.
// rms_rows: a block a group; grid (rows, groups). rms_groups: a warp a group, for narrow ones; grid (rows, groups / warps of a block).
#include "common.cuh"

#define WARPS 8

// The part of a group that `threads` threads share: this one has elements thread, thread + threads ...
__device__ __forceinline__ float squares(const float* x, int width, int thread, int threads)
{
    float sum = 0;
    for (int i = thread; i < width; i += threads) sum += x[i] * x[i];
    return sum;
}

__device__ __forceinline__ void scale(const float* x, const float* weight, float* out, int width, float total, float epsilon, int thread, int threads)
{
    const float factor = __fdiv_rn(1.0f, __fsqrt_rn(__fdiv_rn(total, (float)width) + epsilon));
    for (int i = thread; i < width; i += threads) out[i] = x[i] * factor * weight[i];
}

KERNEL __launch_bounds__(1024)
rms_rows(const float* x, i64 x_stride, const float* weight, float* out, i64 out_stride, const i64* state, int rows_at, int groups, int width, float epsilon)
{
    __shared__ float sums[32];
    const i64 count = state[rows_at];  // before the wait: it does not change within a step
    release_next();
    wait_previous();
    const int row = blockIdx.x, lane = threadIdx.x % 32;
    if (row >= count) return;
    x += row * x_stride + blockIdx.y * width;
    const float own = warp_sum(squares(x, width, threadIdx.x, blockDim.x));
    if (lane == 0) sums[threadIdx.x / 32] = own;
    __syncthreads();
    const float total = warp_sum(lane < blockDim.x / 32 ? sums[lane] : 0.0f);
    scale(x, weight, out + row * out_stride + blockIdx.y * width, width, total, epsilon, threadIdx.x, blockDim.x);
}

KERNEL __launch_bounds__(WARPS * 32)
rms_groups(const float* x, i64 x_stride, const float* weight, float* out, i64 out_stride, const i64* state, int rows_at, int groups, int width, float epsilon)
{
    const i64 count = state[rows_at];  // before the wait: it does not change within a step
    release_next();
    wait_previous();
    const int row = blockIdx.x, group = blockIdx.y * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= count || group >= groups) return;
    x += row * x_stride + group * width;
    scale(x, weight, out + row * out_stride + group * width, width, warp_sum(squares(x, width, lane, 32)), epsilon, lane, 32);
}
