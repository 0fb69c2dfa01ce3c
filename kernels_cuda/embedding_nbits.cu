// Rows of a block-quantised table, in the panels of matmul_nbits (see its reference), to float32. Grid: (tokens, parts of a row); a
// thread has the four bytes that a step of a panel holds for a row: 8 k of 4 bits or 4 of 8.
#include "common.cuh"

KERNEL embedding_nbits(const i64* ids, const u32* codes, const u16* scales, const u8* zero_points, float* out, i64 out_stride,
                       const i64* state, int tokens_at, int bits, int block_size, int k)
{
    const i64 count = state[tokens_at];  // before the wait: it does not change within a step
    release_next();
    wait_previous();
    const int token = blockIdx.x;
    if (token >= count) return;
    const i64 row = ids[token], panel = row / 16, column = row % 16;
    const int step_k = 32 / bits, blocks = (k + block_size - 1) / block_size, steps = blocks * block_size / step_k;
    const u32 mask = (1u << bits) - 1;
    for (int step = blockIdx.y * blockDim.x + threadIdx.x; step < steps; step += gridDim.y * blockDim.x) {
        const i64 block = (panel * blocks + step * step_k / block_size) * 16 + column;
        const float scale = half_to_float(scales[block]);
        const int zero = zero_points ? zero_points[block] : 1 << (bits - 1);
        const u32 word = codes[(panel * steps + step) * 16 + column];
        for (int i = 0; i < step_k; i++)
            if (step * step_k + i < k) out[token * out_stride + step * step_k + i] = ((int)(word >> i * bits & mask) - zero) * scale;
    }
}
