// Many tokens times block-quantised weights, on the int8 matrix units: mma m16n8k32 with 16 outputs of a panel as rows and tokens as
// columns.
//
// Activations are quantised by quantise.cu. A block computes ROWS outputs x COLUMNS tokens with twice (ROWS / 32) x (COLUMNS / 64) warps
// of 32 outputs x 64 tokens each; K goes by in steps of two units of 32, one for each half of the warps, STAGES of them under way by
// cp.async. Codes stay unsigned: the products with their zero point are in where the sums start. A sum of a unit starts at MAGIC, so that
// its bits are a float without conversion, and
//     total += (sum - MAGIC) * weight scale * activation scale
// are two fused operations: MAGIC * weight scale is exact, since a half has 11 bits. Grid: (tiles of outputs, tiles of tokens).
#pragma once
#include "panels.cuh"
#include "quantise.cuh"

enum ZeroPoints { NONE, BYTES, ANY };  // that a kernel takes; ANY: or halves, as the weights say

template <int BITS, int ROWS, int COLUMNS, int ZEROS> struct Stage {
    u8 codes[2][ROWS / 16][64 * BITS];  // [unit][panel][step of 64 bytes]; 4 and 8 bits: in odd pairs of steps the halves change places
    u8 x[COLUMNS][64];                  // chunks of 16 bytes, of row r at chunk ^ (r / 2 % 4)
    UnitInfo info[2][COLUMNS];
    u16 scales[2][ROWS / 16][16];
    u8 zero_points[2][ROWS / 16][ZEROS == ANY ? 32 : 16];
};

// c = a b + (start0, start1, start0, start1), a of unsigned, b of signed bytes
__device__ __forceinline__ void mma_u8_s8(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, i32 start0, i32 start1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %10, %11};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start0), "r"(start1));
}

// What one thread copies in each step of K: its places are fixed, its addresses advance. All loops run over constants.
template <int BITS, int ROWS, int COLUMNS, int THREADS, int ZEROS> struct Copies {
    using S = Stage<BITS, ROWS, COLUMNS, ZEROS>;
    // of 16 bytes
    static constexpr u32 PANELS = ROWS / 16, CHUNKS = 4 * BITS, ALL = 2 * PANELS * CHUNKS, CODES = (ALL + THREADS - 1) / THREADS;
    static constexpr u32 X = COLUMNS * 4 / THREADS;
    const u8 *codes, *x;
    const UnitInfo* info;
    i64 scales, x_rows, info_units;
    u32 codes_unit, scales_unit;
    bool panel, scales_panel;
    int own_panel;  // 3 bits

    __device__ __forceinline__ Copies(const Weights& w, const u8* x_codes, i64 pitch, const UnitInfo* x_info, int info_pitch,
                                      int first_panel, int first_token)
    {
        const u32 t = threadIdx.x, own = t / CHUNKS % PANELS, row = t / 4, scales_own = t / 2 % PANELS;
        panel = first_panel + own < w.panels && t < ALL, own_panel = first_panel + own;
        codes_unit = t / (PANELS * CHUNKS);
        codes = w.codes + ((i64)(panel ? first_panel + own : 0) * w.units + codes_unit) * (64 * BITS) + t % CHUNKS * 16;
        x = x_codes + (first_token + row) * pitch + t % 4 * 16;
        x_rows = THREADS / 4 * pitch;
        info = x_info + (i64)(t / (COLUMNS / 2)) * info_pitch + first_token + t % (COLUMNS / 2) * 2;
        info_units = 2 * info_pitch;
        scales_panel = first_panel + scales_own < w.panels;
        scales_unit = t / (2 * PANELS);
        scales = (i64)(scales_panel ? first_panel + scales_own : 0) * (w.units >> w.block_shift) * 16 + t % 2 * 8;
    }

    // the step that begins with `unit`, the next after the one before
    __device__ __forceinline__ void fetch(S& stage, const Weights& w, int unit)
    {
        static_assert(CODES == 1 || ALL % (2 * THREADS) == 0, "a thread's chunks are of one place in both units");
        const u32 t = threadIdx.x, own = t / CHUNKS % PANELS, chunk = t % CHUNKS, row = t / 4;
        u8* to = &stage.codes[codes_unit][own][(BITS < 4 ? chunk : chunk ^ (chunk >> 2 & 2)) * 16];
        if (BITS == 3 && panel && unit + codes_unit < w.units) {
            const int place = unit + codes_unit;
            codes = w.codes + chunk * 16 + (chunk < 8 ? low_steps(w, own_panel, place) : third_step(w, own_panel, place) - 128);
        }
#pragma unroll
        for (u32 r = 0; r < CODES; r++) {  // 8 bits: a unit is THREADS chunks
            const bool valid = panel && unit + codes_unit + r < w.units;
            if (t < ALL) cp_async_or_zeros<16>(to + r * sizeof(stage.codes[0]), valid ? codes + r * (64 * BITS) : w.codes, valid);
        }
        codes += 2 * 64 * BITS;
#pragma unroll
        for (u32 r = 0; r < X; r++) cp_async16(&stage.x[row + r * (THREADS / 4)][((t ^ row >> 1) & 3) * 16], x + r * x_rows);
        x += 64;
        if (t < COLUMNS) cp_async16(&stage.info[t / (COLUMNS / 2)][t % (COLUMNS / 2) * 2], info);
        info += info_units;
        if (t < 4 * PANELS) {
            const u32 scales_own = t / 2 % PANELS;
            const bool valid = scales_panel && unit + scales_unit < w.units;
            const i64 at = valid ? scales + (unit + scales_unit >> w.block_shift) * 16 : 0;
            cp_async_or_zeros<16>(&stage.scales[scales_unit][scales_own][t % 2 * 8], w.scales + at, valid);
            if (ZEROS == ANY && w.zero_points && w.halves)
                cp_async_or_zeros<16>(&stage.zero_points[scales_unit][scales_own][t % 2 * 16], w.zero_points + 2 * at, valid);
            else if (ZEROS == BYTES || ZEROS == ANY && w.zero_points)
                cp_async_or_zeros<8>(&stage.zero_points[scales_unit][scales_own][t % 2 * 8], w.zero_points + at, valid);
        }
    }
};

// One unit of a stage, of 32 outputs from `row` on and 64 tokens from `column` on.
template <int BITS, int ROWS, int COLUMNS, int ZEROS>
__device__ __forceinline__ void multiply(float (&total)[2][8][4], const Stage<BITS, ROWS, COLUMNS, ZEROS>& stage, const Weights& w, int u,
                                         int row, int column)
{
    const bool has_zeros = ZEROS == BYTES || ZEROS == ANY && w.zero_points, halves = ZEROS == ANY && has_zeros && w.halves;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 a[2][4], b[8][2];
    float scale[2][2], offset[2][2];
    i32 zero[2][2];
    float half_zero[2][2];  // over the default, times minus the scale
#pragma unroll
    for (int m = 0; m < 2; m++) {       // rows g and g + 8 of the matrix are outputs 2g and 2g + 1: they lie together
        const int panel = row / 16 + m;
        const u8* codes = stage.codes[u][panel] + (BITS < 4 ? g * 8 : t * 64 + (g * 8 ^ (t & 2) << 4));
        const uint2 first = *(const uint2*)codes;
        if (BITS < 4) {
            const uint2 second = *(const uint2*)(codes + 64), third = *(const uint2*)(codes + (BITS == 3 ? 128 : 0));
            a[m][0] = four_codes<BITS>(first.x, third.x, 0, t), a[m][1] = four_codes<BITS>(first.y, third.y, 0, t);
            a[m][2] = four_codes<BITS>(second.x, third.x, 1, t), a[m][3] = four_codes<BITS>(second.y, third.y, 1, t);
        } else if (BITS == 4) {
            a[m][0] = first.x & 0x0f0f0f0f, a[m][2] = first.x >> 4 & 0x0f0f0f0f;
            a[m][1] = first.y & 0x0f0f0f0f, a[m][3] = first.y >> 4 & 0x0f0f0f0f;
        } else {
            const uint2 second = *(const uint2*)(codes + 256);
            a[m][0] = first.x, a[m][1] = first.y, a[m][2] = second.x, a[m][3] = second.y;
        }
        const float2 two = halves_to_floats(*(const u32*)&stage.scales[u][panel][2 * g]);
        scale[m][0] = two.x, scale[m][1] = two.y, offset[m][0] = -MAGIC_FLOAT * two.x, offset[m][1] = -MAGIC_FLOAT * two.y;
        if (has_zeros) zero[m][0] = stage.zero_points[u][panel][2 * g], zero[m][1] = stage.zero_points[u][panel][2 * g + 1];
        if (ZEROS == ANY) {
            const float2 points = halves_to_floats(*(const u32*)&stage.zero_points[u][panel][4 * g]);
            half_zero[m][0] = halves ? two.x * (ZERO<BITS> - points.x) : 0, half_zero[m][1] = halves ? two.y * (ZERO<BITS> - points.y) : 0;
        }
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
        const i32 start[2] = {(i32)info.y, (i32)info.w};
        i32 c[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) mma_u8_s8(c[m], a[m], b[j][0], b[j][1], start[0], start[1]);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const i32 sum = has_zeros && !halves ? c[m][i] - start[i % 2] + start_of<BITS>(start[i % 2], zero[m][i / 2]) : c[m][i];
                float product = __fmaf_rn(__int_as_float(sum), scale[m][i / 2], offset[m][i / 2]);
                if (ZEROS == ANY) product = __fmaf_rn((float)(MAGIC - start[i % 2] >> BITS - 1), half_zero[m][i / 2], product);
                total[m][j][i] = __fmaf_rn(product, x_scale[i % 2], total[m][j][i]);
            }
    }
}

template <int BITS, int ROWS, int COLUMNS, int STAGES, int ZEROS>
__device__ __forceinline__ void gemm(const u8* x, i64 pitch, const UnitInfo* info, int info_pitch, const Weights& w, const float* bias,
                                     float* out, i64 out_stride, const i64* state, int tokens_at, int n)
{
    DYNAMIC_SHARED(uint4, shared);
    using S = Stage<BITS, ROWS, COLUMNS, ZEROS>;
    S* stages = (S*)shared;
    constexpr int WARPS_M = ROWS / 32, WARPS = WARPS_M * (COLUMNS / 64), THREADS = 2 * WARPS * 32;
    const int half = threadIdx.x / (WARPS * 32), warp = threadIdx.x / 32 % WARPS, row = warp % WARPS_M * 32, column = warp / WARPS_M * 64;
    const int first_panel = blockIdx.x * (ROWS / 16), first_token = blockIdx.y * COLUMNS, steps = (w.units + 1) / 2;
    const int tokens = (int)state[tokens_at] - first_token;
    release_next();
    wait_previous();
    if (tokens <= 0) return;
    Copies<BITS, ROWS, COLUMNS, THREADS, ZEROS> copies(w, x, pitch, info, info_pitch, first_panel, first_token);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) copies.fetch(stages[s], w, 2 * s);
        cp_async_commit();
    }
    float total[2][8][4] = {};
    S *now = stages, *next = stages + STAGES - 1;
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();                // the step's stage is there, and all are done with the one before, which is filled now
        if (step + STAGES - 1 < steps) copies.fetch(*next, w, 2 * (step + STAGES - 1));
        cp_async_commit();
        if (column < tokens) multiply<BITS, ROWS, COLUMNS, ZEROS>(total, *now, w, half, row, column);
        next = now;
        now = now == stages + STAGES - 1 ? stages : now + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float* other = (float*)shared + (warp * 32 + lane) * 4;  // the two halves of the warps had one unit of each step each
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const float(&own)[4] = total[i / 8][i % 8];
        if (half == 1) *(float4*)&other[i * WARPS * 128] = make_float4(own[0], own[1], own[2], own[3]);
    }
    __syncthreads();
    if (half == 1) return;
#pragma unroll
    for (int m = 0; m < 2; m++) {
        const int output = first_panel * 16 + row + m * 16 + 2 * g;
        const float first = bias && output < n ? bias[output] : 0.0f, second = bias && output + 1 < n ? bias[output + 1] : 0.0f;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float4 rest = *(const float4*)&other[(m * 8 + j) * WARPS * 128];
            const float result[4] = {total[m][j][0] + rest.x + first, total[m][j][1] + rest.y + first, total[m][j][2] + rest.z + second,
                                     total[m][j][3] + rest.w + second};
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const int token = column + j * 8 + 2 * t + c;
                float* to = out + (first_token + token) * out_stride + output;
                if (token < tokens && output < n) to[0] = result[c];
                if (token < tokens && output + 1 < n) to[1] = result[2 + c];
            }
        }
    }
}

#define GEMM(NAME, BITS, ROWS, COLUMNS, STAGES, ZEROS, BLOCKS)                                                                      \
    KERNEL __launch_bounds__(ROWS* COLUMNS / 32, BLOCKS)                                                                            \
    NAME(const u8* x, i64 pitch, const UnitInfo* info, int info_pitch, Weights w, const float* bias, float* out, i64 out_stride,    \
         const i64* state, int tokens_at, int n)                                                                                    \
    {                                                                                                                               \
        gemm<BITS, ROWS, COLUMNS, STAGES, ZEROS>(x, pitch, info, info_pitch, w, bias, out, out_stride, state, tokens_at, n);        \
    }
