// out[i] = x[indices[i]] as float32; x float32 or half, indices int64. Grid: (rows, parts of a row); a thread an element at a time.
#include "common.cuh"

KERNEL gather_rows(const void* x, i64 x_stride, int is_half, const i64* indices, float* out, i64 out_stride, const i64* state,
                   int rows_at, int width)
{
    const i64 count = state[rows_at];  // before the wait: it does not change within a step
    release_next();
    wait_previous();
    const int row = blockIdx.x;
    if (row >= count) return;
    const i64 from = indices[row] * x_stride;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < width; i += gridDim.y * blockDim.x)
        out[row * out_stride + i] = is_half ? half_to_float(((const u16*)x)[from + i]) : ((const float*)x)[from + i];
}
