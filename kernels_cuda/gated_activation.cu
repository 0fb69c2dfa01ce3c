// activation(gate) * up, where each row of x is gate then up; float32. Grid: (rows, parts of a row); a thread an element at a time.
#include "activation.cuh"
#include "common.cuh"

KERNEL gated_activation(const float* x, i64 x_stride, float* out, i64 out_stride, const i64* state, int rows_at, int width, int activation)
{
    const i64 count = state[rows_at];  // before the wait: it does not change within a step
    release_next();
    wait_previous();
    const int row = blockIdx.x;
    if (row >= count) return;
    x += row * x_stride;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < width; i += gridDim.y * blockDim.x)
        out[row * out_stride + i] = activate(x[i], activation) * x[width + i];
}
