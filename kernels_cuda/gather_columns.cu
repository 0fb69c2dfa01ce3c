// out[i][c] = x[i][order[c]], float32; order int64. Grid: (rows, parts of a row); a thread an element at a time. A row fits the first-level
// cache, so that its scattered elements come from there.
#include "common.cuh"

KERNEL gather_columns(const float* x, i64 x_stride, const i64* order, float* out, i64 out_stride, const i64* state, int rows_at,
                      int columns)
{
    const i64 count = state[rows_at];  // before the wait, as the order: neither changes within a step
    int column = blockIdx.y * blockDim.x + threadIdx.x;
    i64 from = column < columns ? order[column] : 0;
    release_next();
    wait_previous();
    const int row = blockIdx.x;
    if (row >= count) return;
    x += row * x_stride, out += row * out_stride;
    while (column < columns) {
        out[column] = x[from];
        column += gridDim.y * blockDim.x;
        if (column < columns) from = order[column];
    }
}
