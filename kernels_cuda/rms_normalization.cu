// Root-mean-square normalisation of every row, or of every group of a row (a head). All float32.
// rms_rows: a block a group; grid (rows, groups). rms_groups: a warp a group, for narrow ones; grid (rows, groups / warps of a block).
// ordered: null, or where a row that is one group goes once more, with its columns in another order: ordered[i] = out[order[i]].
#include "common.cuh"
#include "normalization.cuh"

#define WARPS 8

#define EACH 4  // elements of a thread that stay in registers

// A group by `threads` threads, this one number `thread`. The weight is loaded before the kernel before has ended, x once. total_of(own
// sum) adds up over the threads; together() has all of them see what each has written.
template <class Total, class Together>
__device__ __forceinline__ void normalize(const float* x, const float* weight, float* out, bool valid, int width, float epsilon,
                                          const i64* order, float* ordered, int thread, int threads, Total total_of, Together together)
{
    float v[EACH], gain[EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) gain[i] = thread + i * threads < width ? weight[thread + i * threads] : 0.0f;
    if (ordered && 16 * thread < width) prefetch_l2(order + 16 * thread);
    release_next();
    wait_previous();
    if (!valid) return;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        v[i] = thread + i * threads < width ? x[thread + i * threads] : 0.0f;
        sum += v[i] * v[i];
    }
    for (int i = thread + EACH * threads; i < width; i += threads) sum += x[i] * x[i];
    const float factor = factor_of(total_of(sum), width, epsilon);
    int from[EACH];  // all of them at once, and not held while a sum is waited for
#pragma unroll
    for (int i = 0; i < EACH; i++) from[i] = ordered && thread + i * threads < width ? (int)order[thread + i * threads] : 0;
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (thread + i * threads < width) out[thread + i * threads] = v[i] * factor * gain[i];
    for (int i = thread + EACH * threads; i < width; i += threads) out[i] = x[i] * factor * weight[i];
    if (!ordered) return;
    together();
#pragma unroll
    for (int i = 0; i < EACH; i++) v[i] = out[from[i]];
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (thread + i * threads < width) ordered[thread + i * threads] = v[i];
    for (int i = thread + EACH * threads; i < width; i += threads) ordered[i] = out[order[i]];
}

KERNEL __launch_bounds__(1024)
rms_rows(const float* x, i64 x_stride, const float* weight, float* out, i64 out_stride, const i64* state, int rows_at, int groups,
         int width, float epsilon, const i64* order, float* ordered)
{
    __shared__ float sums[32];
    const int row = blockIdx.x, lane = threadIdx.x % 32;
    const auto total_of = [&](float own) {
        own = warp_sum(own);
        if (lane == 0) sums[threadIdx.x / 32] = own;
        __syncthreads();
        return warp_sum(lane < blockDim.x / 32 ? sums[lane] : 0.0f);
    };
    normalize(x + row * x_stride + blockIdx.y * width, weight, out + row * out_stride + blockIdx.y * width, row < state[rows_at], width,
              epsilon, order, ordered, threadIdx.x, blockDim.x, total_of, [] { __syncthreads(); });
}

KERNEL __launch_bounds__(WARPS * 32)
rms_groups(const float* x, i64 x_stride, const float* weight, float* out, i64 out_stride, const i64* state, int rows_at, int groups,
           int width, float epsilon, const i64* order, float* ordered)
{
    const int row = blockIdx.x, group = blockIdx.y * WARPS + threadIdx.x / 32;
    normalize(x + row * x_stride + group * width, weight, out + row * out_stride + group * width, row < state[rows_at] && group < groups,
              width, epsilon, order, ordered, threadIdx.x % 32, 32, [](float own) { return warp_sum(own); }, [] { __syncwarp(); });
}
