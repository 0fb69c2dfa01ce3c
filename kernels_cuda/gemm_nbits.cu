// Many tokens times block-quantised weights, on the int8 matrix units: mma m16n8k32 with 16 outputs of a panel as rows and tokens as columns.
//
// Activations are quantised by quantise.cu. A block computes ROWS outputs x COLUMNS tokens with (ROWS / 32) x (COLUMNS / 64) warps of 32 outputs x
// 64 tokens each; K goes by in steps of two units of 32, STAGES of them under way by cp.async. Codes stay unsigned: the products with their zero
// point are in where the sums start. A sum of a unit starts at MAGIC, so that its bits are a float without conversion, and
//     total += (sum - MAGIC) * weight scale * activation scale
// are two fused operations: MAGIC * weight scale is exact, since a half has 11 bits. Grid: (tiles of outputs, tiles of tokens).
#include "quantise.cuh"

struct Weights {
    const u8* codes;
    const u16* scales;
    const u8* zero_points;
    int units, block_shift, panels;
};

template <int BITS, int ROWS, int COLUMNS> struct Stage {
    u8 codes[2][ROWS / 16][64 * BITS];  // [unit][panel][step of 64 bytes]; in odd pairs of steps the halves change places
    u8 x[COLUMNS][64];                  // chunks of 16 bytes, of row r at chunk ^ (r / 2 % 4)
    UnitInfo info[2][COLUMNS];
    u16 scales[2][ROWS / 16][16];
    u8 zero_points[2][ROWS / 16][16];
};

// c = a b + (start0, start1, start0, start1), a of unsigned, b of signed bytes
__device__ __forceinline__ void mma_u8_s8(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, i32 start0, i32 start1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %10, %11};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start0), "r"(start1));
}

// Step `unit / 2` of K into a stage. Loops run over constants, so that a thread's few copies stand in a row with addresses that only advance.
template <int BITS, int ROWS, int COLUMNS>
__device__ __forceinline__ void fetch(Stage<BITS, ROWS, COLUMNS>& stage, const Weights& w, const u8* x, i64 pitch, const UnitInfo* info,
                                      int info_pitch, int first_panel, int first_token, int unit)
{
    constexpr u32 THREADS = ROWS * COLUMNS / 64, PANELS = ROWS / 16, CHUNKS = 4 * BITS;  // of 16 bytes in a unit of a panel
    const u32 thread = threadIdx.x;
#pragma unroll
    for (u32 r = 0; r < 2 * PANELS * CHUNKS / THREADS; r++) {
        const u32 i = r * THREADS + thread, u = i / (PANELS * CHUNKS), panel = i / CHUNKS % PANELS, chunk = i % CHUNKS, swap = chunk >> 2 & 2;
        const bool valid = unit + u < w.units && first_panel + panel < w.panels;
        const u8* from = w.codes + ((i64)(first_panel + panel) * w.units + unit + u) * (64 * BITS) + chunk * 16;
        cp_async_or_zeros<16>(&stage.codes[u][panel][(chunk ^ swap) * 16], valid ? from : w.codes, valid);
    }
#pragma unroll
    for (u32 r = 0; r < COLUMNS * 4 / THREADS; r++) {
        const u32 i = r * THREADS + thread, row = i / 4, chunk = i % 4;
        cp_async16(&stage.x[row][(chunk ^ (row >> 1 & 3)) * 16], x + (first_token + row) * pitch + unit * 32 + chunk * 16);
    }
#pragma unroll
    for (u32 r = 0; r < COLUMNS / THREADS; r++) {
        const u32 i = r * THREADS + thread, u = i / (COLUMNS / 2), token = i % (COLUMNS / 2) * 2;
        cp_async16(&stage.info[u][token], info + (i64)(unit + u) * info_pitch + first_token + token);
    }
    if (thread < 4 * PANELS) {
        const u32 u = thread / (2 * PANELS), panel = thread / 2 % PANELS, half = thread % 2;
        const bool valid = unit + u < w.units && first_panel + panel < w.panels;
        const i64 at = valid ? ((i64)(first_panel + panel) * (w.units >> w.block_shift) + (unit + u >> w.block_shift)) * 16 + half * 8 : 0;
        cp_async_or_zeros<16>(&stage.scales[u][panel][half * 8], w.scales + at, valid);
        if (w.zero_points) cp_async_or_zeros<8>(&stage.zero_points[u][panel][half * 8], w.zero_points + at, valid);
    }
}

template <int BITS, int ROWS, int COLUMNS>
__device__ __forceinline__ void multiply(float (&total)[2][8][4], const Stage<BITS, ROWS, COLUMNS>& stage, int u, int row, int column, bool has_zeros)
{
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 a[2][4], b[8][2];
    float scale[2][2], offset[2][2];
    i32 zero[2][2] = {};                // less the default, which is in where the sums start
    constexpr int ZERO = 1 << (BITS - 1);
#pragma unroll
    for (int m = 0; m < 2; m++) {       // rows g and g + 8 of the matrix are outputs 2g and 2g + 1: they lie together
        const int panel = row / 16 + m;
        const u8* codes = stage.codes[u][panel];
        const uint2 first = *(const uint2*)(codes + t * 64 + (g * 8 ^ (t & 2) << 4));
        if (BITS == 4) {
            a[m][0] = first.x & 0x0f0f0f0f, a[m][1] = first.y & 0x0f0f0f0f, a[m][2] = first.x >> 4 & 0x0f0f0f0f, a[m][3] = first.y >> 4 & 0x0f0f0f0f;
        } else {
            const uint2 second = *(const uint2*)(codes + 256 + t * 64 + (g * 8 ^ (t & 2) << 4));
            a[m][0] = first.x, a[m][1] = first.y, a[m][2] = second.x, a[m][3] = second.y;
        }
        const float2 two = halves_to_floats(*(const u32*)&stage.scales[u][panel][2 * g]);
        scale[m][0] = two.x, scale[m][1] = two.y, offset[m][0] = -MAGIC_FLOAT * two.x, offset[m][1] = -MAGIC_FLOAT * two.y;
        if (has_zeros) zero[m][0] = stage.zero_points[u][panel][2 * g] - ZERO, zero[m][1] = stage.zero_points[u][panel][2 * g + 1] - ZERO;
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {    // two tiles of 8 tokens, each with its first and second 16 K
        const int token = column + j * 8 + (lane >> 4) * 8 + (lane & 7), chunk = 2 * u + (lane >> 3 & 1);
        u32 four[4];
        load_matrices(four, &stage.x[token][(chunk ^ (token >> 1 & 3)) * 16]);
        b[j][0] = four[0], b[j][1] = four[1], b[j + 1][0] = four[2], b[j + 1][1] = four[3];
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const uint4 info = *(const uint4*)&stage.info[u][column + j * 8 + 2 * t];
        const float x_scale[2] = {__uint_as_float(info.x), __uint_as_float(info.z)};
        const i32 sums[2] = {(i32)info.y, (i32)info.w};
#pragma unroll
        for (int m = 0; m < 2; m++) {
            i32 c[4];
            mma_u8_s8(c, a[m], b[j][0], b[j][1], MAGIC - ZERO * sums[0], MAGIC - ZERO * sums[1]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (has_zeros) c[i] -= zero[m][i / 2] * sums[i % 2];
                total[m][j][i] = __fmaf_rn(__fmaf_rn(__int_as_float(c[i]), scale[m][i / 2], offset[m][i / 2]), x_scale[i % 2], total[m][j][i]);
            }
        }
    }
}

template <int BITS, int ROWS, int COLUMNS, int STAGES>
__device__ __forceinline__ void gemm(const u8* x, i64 pitch, const UnitInfo* info, int info_pitch, const Weights& w, const float* bias, float* out,
                                     i64 out_stride, const i64* state, int tokens_at, int n)
{
    extern __shared__ uint4 shared[];
    using S = Stage<BITS, ROWS, COLUMNS>;
    S* stages = (S*)shared;
    constexpr int WARPS_M = ROWS / 32;
    const int warp = threadIdx.x / 32, row = warp % WARPS_M * 32, column = warp / WARPS_M * 64;
    const int first_panel = blockIdx.x * (ROWS / 16), first_token = blockIdx.y * COLUMNS, steps = (w.units + 1) / 2;
    release_next();
    wait_previous();
    const int tokens = (int)state[tokens_at] - first_token;
    if (tokens <= 0) return;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) fetch(stages[s], w, x, pitch, info, info_pitch, first_panel, first_token, 2 * s);
        cp_async_commit();
    }
    float total[2][8][4] = {};
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();                // the step's stage is there, and all are done with the one before, which is filled now
        const int ahead = step + STAGES - 1;
        if (ahead < steps) fetch(stages[ahead % STAGES], w, x, pitch, info, info_pitch, first_panel, first_token, 2 * ahead);
        cp_async_commit();
        if (column < tokens) {
#pragma unroll 1
            for (int u = 0; u < 2; u++) multiply(total, stages[step % STAGES], u, row, column, w.zero_points != nullptr);
        }
    }
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const int output = first_panel * 16 + row + m * 16 + 2 * g;
        const float first = bias && output < n ? bias[output] : 0.0f, second = bias && output + 1 < n ? bias[output + 1] : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int token = column + j * 8 + 2 * t + c;
                float* to = out + (first_token + token) * out_stride + output;
                if (token < tokens && output < n) to[0] = total[m][j][c] + first;
                if (token < tokens && output + 1 < n) to[1] = total[m][j][2 + c] + second;
            }
    }
}

#define GEMM(NAME, BITS, ROWS, COLUMNS, STAGES)                                                                                     \
    KERNEL __launch_bounds__(ROWS* COLUMNS / 64, 2) NAME(const u8* x, i64 pitch, const UnitInfo* info, int info_pitch, Weights w,    \
                                                         const float* bias, float* out, i64 out_stride, const i64* state, int tokens_at, int n) \
    {                                                                                                                               \
        gemm<BITS, ROWS, COLUMNS, STAGES>(x, pitch, info, info_pitch, w, bias, out, out_stride, state, tokens_at, n);               \
    }

GEMM(gemm_4, 4, 64, 128, 4)
GEMM(gemm_8, 8, 64, 128, 4)
