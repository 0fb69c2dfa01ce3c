// out = x + y, all float32. Grid: (rows, parts of a row); a thread an element at a time.
#include "common.cuh"

KERNEL add(const float* x, i64 x_stride, const float* y, i64 y_stride, float* out, i64 out_stride, const i64* state, int rows_at, int width)
{
    const i64 count = state[rows_at];  // before the wait: it does not change within a step
    release_next();
    wait_previous();
    const int row = blockIdx.x;
    if (row >= count) return;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < width; i += gridDim.y * blockDim.x)
        out[row * out_stride + i] = x[row * x_stride + i] + y[row * y_stride + i];
}
