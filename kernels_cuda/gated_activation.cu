// activation(gate) * up, where each row of x is gate then up; float32. Grid: (rows, parts of a row); a thread an element at a time.
#include "common.cuh"

__device__ __forceinline__ float activate(float x, int activation)
{
    if (activation == 0) return x / (1.0f + expf(-x));                                                     // silu
    if (activation == 1) return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));  // gelu_tanh
    return fmaxf(x, 0.0f) * fmaxf(x, 0.0f);                                                                // relu2
}

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
