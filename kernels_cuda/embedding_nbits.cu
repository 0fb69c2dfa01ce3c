// Rows of a block-quantised table, in the panels of matmul_nbits (see its reference), to float32. Grid: (tokens, parts of a row); a
// thread has the four bytes that a step of a panel holds for a row: 8 k of 4 bits, 4 of 8, or the low two bits of 16.
#include "common.cuh"

KERNEL embedding_nbits(const i64* ids, const u32* codes, const u16* scales, const u8* zero_points, float* out, i64 out_stride,
                       const i64* state, int tokens_at, int bits, int block_size, int k, int halves)
{
    const i64 count = state[tokens_at];  // before the wait: it does not change within a step
    release_next();
    wait_previous();
    const int token = blockIdx.x;
    if (token >= count) return;
    const i64 row = ids[token], panel = row / 16, column = row % 16;
    const int low_bits = bits == 3 ? 2 : bits, step_k = 32 / low_bits, blocks = (k + block_size - 1) / block_size;
    const int block_steps = block_size / step_k, all_steps = block_steps + (bits == 3 ? block_size / 32 : 0);
    const u32 mask = (1u << low_bits) - 1;
    for (int step = blockIdx.y * blockDim.x + threadIdx.x; step < blocks * block_steps; step += gridDim.y * blockDim.x) {
        const int b = step / block_steps, inner = step % block_steps;
        const i64 block = panel * blocks + b, about = block * 16 + column;
        const float scale = half_to_float(scales[about]);
        const float zero = !zero_points ? 1 << (bits - 1) : halves ? half_to_float(((const u16*)zero_points)[about]) : zero_points[about];
        const u32* words = codes + block * all_steps * 16 + column;
        const u32 word = words[inner * 16], third = bits == 3 ? words[(block_steps + inner / 2) * 16] >> inner % 2 * 4 : 0;
        for (int i = 0; i < step_k; i++) {
            const int code = (word >> i * low_bits & mask) | (third >> (8 * (i / 4 & 3) + i % 4) & 1) << 2;
            if (step * step_k + i < k) out[token * out_stride + step * step_k + i] = (code - zero) * scale;
        }
    }
}
