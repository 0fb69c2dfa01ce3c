// Many tokens times ternary weights, on the int8 matrix units: mma m16n8k32 with 16 outputs of a panel as rows and tokens as columns.
//
// One factor holds for all of a token and one scale for all of an output, so integers are summed over all of K. As long as weights and
// activations agree, the order of K is free: thread t of a group of four takes field t of each word, which is a shift and a mask, and word
// t of the token's step. A block computes ROWS outputs x COLUMNS tokens; its 8 warps have 32 outputs x 32 tokens each. K goes by in stages
// of four steps, STAGES of them under way by cp.async. Grid: (tiles of outputs, tiles of tokens).
#include "ternary.cuh"

#define ROWS 64
#define COLUMNS 128
#define STAGES 4
#define STEPS 4  // of a stage

struct Stage {
    uint2 codes[ROWS / 16][STEPS][8];  // [panel][step][pair of outputs]
    uint4 x[COLUMNS][STEPS];           // step s of row r at s ^ (r / 2 % 4)
};

// c += a b, a of unsigned, b of signed bytes
__device__ __forceinline__ void mma_u8_s8(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

KERNEL __launch_bounds__(256, 2)
gemm_ternary(const uint4* codes, int steps, const uint4* x_codes, const TokenInfo* info, const float* scales, const float* bias, float* out,
             i64 out_stride, const i64* state, int tokens_at, int n)
{
    __shared__ Stage stages[STAGES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_panel = blockIdx.x * (ROWS / 16), first_token = blockIdx.y * COLUMNS, panels = (n + 15) / 16;
    const int tokens = (int)state[tokens_at] - first_token, row = warp % 2 * 2, column = warp / 2 * 32;
    release_next();
    wait_previous();
    if (tokens <= 0) return;
    const int own = threadIdx.x / 16, own_x = threadIdx.x / 4, x_step = threadIdx.x % 4;
    const bool there = first_panel + own < panels;
    const auto fetch = [&](Stage& stage, int step) {
        if (own < ROWS / 16)  // 16 threads copy the 256 bytes of a panel
            cp_async_or_zeros<16>((uint4*)stage.codes[own] + threadIdx.x % 16,
                                  codes + ((i64)(there ? first_panel + own : 0) * steps + step) * 4 + threadIdx.x % 16, there);
#pragma unroll
        for (int r = 0; r < COLUMNS; r += 64)
            cp_async16(&stage.x[own_x + r][x_step ^ (own_x >> 1 & 3)], x_codes + (i64)(first_token + own_x + r) * steps + step + x_step);
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s * STEPS < steps) fetch(stages[s], s * STEPS);
        cp_async_commit();
    }
    i32 sum[2][4][4] = {};
    int now = 0;
    for (int step = 0; step < steps; step += STEPS) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // the stage is there, and all are done with the one before, which is filled now
        const int ahead = step + (STAGES - 1) * STEPS;
        if (ahead < steps) fetch(stages[(now + STAGES - 1) % STAGES], ahead);
        cp_async_commit();
        const Stage& stage = stages[now];
        now = (now + 1) % STAGES;
        if (column >= tokens) continue;
#pragma unroll
        for (int s = 0; s < STEPS; s += 2) {
            u32 a[2][4], b[4][2];
#pragma unroll
            for (int m = 0; m < 2; m++) {  // rows g and g + 8 of the matrix are outputs 2g and 2g + 1: they lie together
                const uint2 first = stage.codes[row + m][s][g], second = stage.codes[row + m][s + 1][g];
                a[m][0] = first.x >> 2 * t & 0x03030303, a[m][1] = first.y >> 2 * t & 0x03030303;
                a[m][2] = second.x >> 2 * t & 0x03030303, a[m][3] = second.y >> 2 * t & 0x03030303;
            }
#pragma unroll
            for (int j = 0; j < 4; j += 2) {  // two tiles of 8 tokens, each with both steps
                const int token = column + j * 8 + (lane >> 4) * 8 + (lane & 7), chunk = s + (lane >> 3 & 1);
                u32 four[4];
                load_matrices(four, &stage.x[token][chunk ^ (token >> 1 & 3)]);
                b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
            }
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma_u8_s8(sum[m][j], a[m], b[j][0], b[j][1]);
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int o = 0; o < 2; o++) {
            const int output = (first_panel + row + m) * 16 + 2 * g + o;
            if (output >= n) continue;
            const float scale = scales[output], offset = bias ? bias[output] : 0.0f;
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    const int at = column + j * 8 + 2 * t + c, token = first_token + at;
                    if (at < tokens) out[token * out_stride + output] = finish(sum[m][j][2 * o + c], info[token], scale, offset);
                }
        }
}
