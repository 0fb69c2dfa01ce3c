// Many tokens times block-quantised weights, on the int8 matrix units: mma m16n8k32 with 16 outputs of a panel as rows and tokens as
// columns.
//
// Activations are quantised by quantise.cu. A block computes ROWS outputs x COLUMNS tokens; K goes by in steps of UNITS units of 32, STAGES
// of them under way by cp.async. Its warps are UNITS parties, one for each unit of a step, of warps with 32 outputs x 64 tokens each (all
// tokens of a tile that has fewer). A sum of a unit starts at MAGIC, so that its bits are a float without conversion, and
//     total += (sum - MAGIC) * weight scale * activation scale
// are two fused operations: MAGIC * weight scale is exact, since a half has 11 bits. Grid: (tiles of outputs, tiles of tokens, ranges of
// K): where tiles are too few for all processors, several blocks share one, and the last of them to end adds up what all have, in order.
#pragma once
#include "last_block.cuh"
#include "panels.cuh"
#include "quantise.cuh"

enum ZeroPoints { NONE, BYTES, HALVES };

template <int BITS, int ROWS, int COLUMNS, int UNITS, int ZEROS> struct Stage {
    u8 codes[UNITS][ROWS / 16][64 * BITS];  // [unit][panel][step of 64 bytes]; 4 and 8 bits: in odd pairs of steps halves change places
    u8 x[COLUMNS][32 * UNITS];              // chunks of 16 bytes, at place_of()
    UnitInfo info[UNITS][COLUMNS];
    u16 scales[UNITS][ROWS / 16][16];
    u8 zero_points[UNITS][ROWS / 16][ZEROS == HALVES ? 32 : 16];
    // of a chunk of a token: eight tokens side by side are in banks of their own
    static __device__ __forceinline__ u32 place_of(u32 token, u32 chunk)
    {
        return (chunk ^ (UNITS == 2 ? token >> 1 & 3 : token & 7)) * 16;
    }
};

// c = a b + start, a and b of signed bytes
__device__ __forceinline__ void mma_s8_from(i32 (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, i32 start)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(start));
}

// What one thread copies in each step of K: its places are fixed, its addresses advance. All loops run over constants.
template <int BITS, int ROWS, int COLUMNS, int UNITS, int THREADS, int ZEROS> struct Copies {
    using S = Stage<BITS, ROWS, COLUMNS, UNITS, ZEROS>;
    // of 16 bytes
    static constexpr u32 PANELS = ROWS / 16, CHUNKS = 4 * BITS, ALL = UNITS * PANELS * CHUNKS, CODES = (ALL + THREADS - 1) / THREADS;
    static constexpr u32 TOGETHER = THREADS / (PANELS * CHUNKS);  // units whose codes all threads copy at a time, where CODES > 1
    static constexpr u32 WIDTH = 2 * UNITS, ALL_X = COLUMNS * WIDTH, X = (ALL_X + THREADS - 1) / THREADS;
    const u8 *codes, *x;
    const UnitInfo* info;
    i64 scales, x_rows;
    u32 codes_unit, scales_unit;
    int codes_end, scales_end;  // units past these are zeros: with a scale of 0 they add nothing
    int info_units, own_panel;  // own_panel: 3 bits

    __device__ __forceinline__ Copies(const Weights& w, const u8* x_codes, i64 pitch, const UnitInfo* x_info, int info_pitch,
                                      int first_panel, int first_token, int first_unit)
    {
        const u32 t = threadIdx.x, own = t / CHUNKS % PANELS, row = t / WIDTH, scales_own = t / 2 % PANELS;
        const bool panel = first_panel + own < w.panels, scales_panel = first_panel + scales_own < w.panels;
        own_panel = first_panel + own;
        codes_unit = t / (PANELS * CHUNKS), codes_end = panel ? w.units - codes_unit : 0;
        codes = w.codes + ((i64)(panel ? first_panel + own : 0) * w.units + first_unit + codes_unit) * (64 * BITS) + t % CHUNKS * 16;
        x = x_codes + (first_token + row) * pitch + first_unit * 32 + t % WIDTH * 16;
        x_rows = THREADS / WIDTH * pitch;
        info = x_info + (i64)(first_unit + t / (COLUMNS / 2)) * info_pitch + first_token + t % (COLUMNS / 2) * 2;
        info_units = UNITS * info_pitch;
        scales_unit = t / (2 * PANELS), scales_end = scales_panel ? w.units - scales_unit : 0;
        scales = (i64)(scales_panel ? first_panel + scales_own : 0) * (w.units >> w.block_shift) * 16 + t % 2 * 8;
    }

    // the weights of the step that begins with `unit`, the next after the one before
    __device__ __forceinline__ void fetch_weights(S& stage, const Weights& w, int unit)
    {
        static_assert(CODES == 1 || THREADS % (PANELS * CHUNKS) == 0, "a thread's chunks are of one place in all units");
        const u32 t = threadIdx.x, own = t / CHUNKS % PANELS, chunk = t % CHUNKS;
        u8* to = &stage.codes[codes_unit][own][(BITS < 4 ? chunk : chunk ^ (chunk >> 2 & 2)) * 16];
        if (BITS == 3 && unit < codes_end) {
            const int place = unit + codes_unit;
            codes = w.codes + chunk * 16 + (chunk < 8 ? low_steps(w, own_panel, place) : third_step(w, own_panel, place) - 128);
        }
#pragma unroll
        for (u32 r = 0; r < CODES; r++) {
            const bool valid = unit + (int)(r * TOGETHER) < codes_end;
            const u8* from = valid ? codes + r * TOGETHER * (64 * BITS) : w.codes;
            if (t < ALL) cp_async_or_zeros<16>(to + r * TOGETHER * sizeof(stage.codes[0]), from, valid);
        }
        codes += UNITS * 64 * BITS;
        if (t < 2 * UNITS * PANELS) {
            const u32 scales_own = t / 2 % PANELS;
            const bool valid = unit < scales_end;
            const i64 at = valid ? scales + (unit + scales_unit >> w.block_shift) * 16 : 0;
            cp_async_or_zeros<16>(&stage.scales[scales_unit][scales_own][t % 2 * 8], w.scales + at, valid);
            if (ZEROS == HALVES)
                cp_async_or_zeros<16>(&stage.zero_points[scales_unit][scales_own][t % 2 * 16], w.zero_points + 2 * at, valid);
            else if (ZEROS == BYTES)
                cp_async_or_zeros<8>(&stage.zero_points[scales_unit][scales_own][t % 2 * 8], w.zero_points + at, valid);
        }
    }

    // the activations of a step
    __device__ __forceinline__ void fetch_x(S& stage)
    {
        const u32 t = threadIdx.x, row = t / WIDTH;
#pragma unroll
        for (u32 r = 0; r < X; r++)  // rows that are a multiple of 8 apart: their places are alike
            if (t < ALL_X) cp_async16(&stage.x[row + r * (THREADS / WIDTH)][S::place_of(row, t % WIDTH)], x + r * x_rows);
        x += 32 * UNITS;
        if (t < UNITS * COLUMNS / 2) cp_async16(&stage.info[t / (COLUMNS / 2)][t % (COLUMNS / 2) * 2], info);
        info += info_units;
    }
};

// Codes, less the default zero point, as signed bytes: in the upper bits of each, which is a factor of FACTOR and saves a subtraction.
template <int BITS> constexpr int FACTOR = 256 >> BITS;
template <int BITS> __device__ __forceinline__ u32 signed_codes(u32 codes) { return codes << 8 - BITS ^ 0x80808080; }

// One unit of a stage, of 32 outputs from `row` on and 8 * TILES tokens from `column` on.
template <int BITS, int ROWS, int COLUMNS, int UNITS, int ZEROS, int TILES>
__device__ __forceinline__ void multiply(float (&total)[2][TILES][4], const Stage<BITS, ROWS, COLUMNS, UNITS, ZEROS>& stage, int u, int row,
                                         int column)
{
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 a[2][4], b[2][4];
    float scale[2][2], offset[2][2];
    i32 zero[2][2];
    float half_zero[2][2];
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
            a[m][0] = first.x & 0x0f0f0f0f, a[m][1] = first.y & 0x0f0f0f0f;
            a[m][2] = first.x >> 4 & 0x0f0f0f0f, a[m][3] = first.y >> 4 & 0x0f0f0f0f;
        } else {
            const uint2 second = *(const uint2*)(codes + 256);
            a[m][0] = first.x, a[m][1] = first.y, a[m][2] = second.x, a[m][3] = second.y;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) a[m][i] = signed_codes<BITS>(a[m][i]);
        const float2 two = halves_to_floats(*(const u32*)&stage.scales[u][panel][2 * g]);
        scale[m][0] = two.x * (1.0f / FACTOR<BITS>), scale[m][1] = two.y * (1.0f / FACTOR<BITS>);
        offset[m][0] = -MAGIC_FLOAT * scale[m][0], offset[m][1] = -MAGIC_FLOAT * scale[m][1];
        if (ZEROS == BYTES) {
            const u8* points = &stage.zero_points[u][panel][2 * g];
            zero[m][0] = (ZERO<BITS> - points[0]) * FACTOR<BITS>, zero[m][1] = (ZERO<BITS> - points[1]) * FACTOR<BITS>;
        }
        if (ZEROS == HALVES) {
            const float2 points = halves_to_floats(*(const u32*)&stage.zero_points[u][panel][4 * g]);
            half_zero[m][0] = two.x * (ZERO<BITS> - points.x), half_zero[m][1] = two.y * (ZERO<BITS> - points.y);
        }
    }
    const auto load = [&](u32 (&four)[4], int j) {  // two tiles of 8 tokens, each with its first and second 16 K
        const int token = column + j * 8 + (lane >> 4) * 8 + (lane & 7), chunk = 2 * u + (lane >> 3 & 1);
        load_matrices(four, &stage.x[token][stage.place_of(token, chunk)]);
    };
    load(b[0], 0);
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        if (j % 2 == 0 && j + 2 < TILES) load(b[(j + 2) / 2 % 2], j + 2);
        const uint4 info = *(const uint4*)&stage.info[u][column + j * 8 + 2 * t];
        const float x_scale[2] = {__uint_as_float(info.x), __uint_as_float(info.z)};
        const i32 x_sum[2] = {MAGIC - (i32)info.y >> BITS - 1, MAGIC - (i32)info.w >> BITS - 1};
        i32 c[2][4];
#pragma unroll
        for (int m = 0; m < 2; m++) mma_s8_from(c[m], a[m], b[j / 2 % 2][j % 2 * 2], b[j / 2 % 2][j % 2 * 2 + 1], MAGIC);
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const i32 sum = ZEROS == BYTES ? c[m][i] + zero[m][i / 2] * x_sum[i % 2] : c[m][i];
                float product = __fmaf_rn(__int_as_float(sum), scale[m][i / 2], offset[m][i / 2]);
                if (ZEROS == HALVES) product = __fmaf_rn((float)x_sum[i % 2], half_zero[m][i / 2], product);
                total[m][j][i] = __fmaf_rn(product, x_scale[i % 2], total[m][j][i]);
            }
    }
}

template <int BITS, int ROWS, int COLUMNS, int UNITS, int STAGES, int ZEROS>
__device__ __forceinline__ void gemm(const u8* x, i64 pitch, const UnitInfo* info, int info_pitch, const Weights& w, const float* bias,
                                     float* out, i64 out_stride, float4* partials, const i64* state, int tokens_at, int n)
{
    DYNAMIC_SHARED(uint4, shared);
    using S = Stage<BITS, ROWS, COLUMNS, UNITS, ZEROS>;
    S* stages = (S*)shared;
    constexpr int TILES = (COLUMNS < 64 ? COLUMNS : 64) / 8, WARPS_M = ROWS / 32, PARTY = WARPS_M * (COLUMNS / (8 * TILES)) * 32;
    constexpr int THREADS = UNITS * PARTY, OWN = 2 * TILES / UNITS;
    static_assert(STAGES * sizeof(S) >= (UNITS - 1) * ROWS * COLUMNS * 4, "what parties hand to each other takes the place of stages");
    const int party = threadIdx.x / PARTY, member = threadIdx.x % PARTY, warp = member / 32;
    const int row = warp % WARPS_M * 32, column = warp / WARPS_M * (8 * TILES);
    const int first_panel = blockIdx.x * (ROWS / 16), first_token = blockIdx.y * COLUMNS, all = (w.units + UNITS - 1) / UNITS;
    const int first = all * blockIdx.z / gridDim.z * UNITS, end = all * (blockIdx.z + 1) / gridDim.z * UNITS;  // units of this range
    const int tokens = (int)state[tokens_at] - first_token;
    Copies<BITS, ROWS, COLUMNS, UNITS, THREADS, ZEROS> copies(w, x, pitch, info, info_pitch, first_panel, first_token, first);
    if (tokens > 0) {
#pragma unroll
        for (int s = 0; s < STAGES - 1; s++)  // weights do not depend on the kernel before
            if (first + s * UNITS < end) copies.fetch_weights(stages[s], w, first + s * UNITS);
    }
    release_next();
    wait_previous();
    if (tokens <= 0) return;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (first + s * UNITS < end) copies.fetch_x(stages[s]);
        cp_async_commit();
    }
    float total[2][TILES][4] = {};
    S *now = stages, *next = stages + STAGES - 1;
    for (int ahead = first + (STAGES - 1) * UNITS; ahead < end + (STAGES - 1) * UNITS; ahead += UNITS) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();                // the step's stage is there, and all are done with the one before, which is filled now
        if (ahead < end) {
            copies.fetch_weights(*next, w, ahead);
            copies.fetch_x(*next);
        }
        cp_async_commit();
        if (column < tokens) multiply<BITS, ROWS, COLUMNS, UNITS, ZEROS, TILES>(total, *now, party, row, column);
        next = now;
        now = now == stages + STAGES - 1 ? stages : now + 1;
    }
    cp_async_wait<0>();
    __syncthreads();
    // Each party adds up OWN of the 2 * TILES quadruples that a thread and its like in the other parties have.
    float4 own[OWN], *room = (float4*)shared + member;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
        const float(&four)[4] = total[i / TILES][i % TILES];
        const float4 value = make_float4(four[0], four[1], four[2], four[3]);
        const int owner = i / OWN, slot = (party - owner + UNITS - 1) % UNITS;
        if (owner == party) own[i % OWN] = value;
        else room[(i * (UNITS - 1) + slot) * PARTY] = value;
    }
    __syncthreads();
    const auto add = [](float4& sum, const float4& y) { sum.x += y.x, sum.y += y.y, sum.z += y.z, sum.w += y.w; };
#pragma unroll
    for (int i = 0; i < OWN; i++)
#pragma unroll
        for (int slot = 0; slot < UNITS - 1; slot++) add(own[i], room[((party * OWN + i) * (UNITS - 1) + slot) * PARTY]);
    if (gridDim.z > 1) {
        const int tile = blockIdx.y * gridDim.x + blockIdx.x;
        float4* parts = partials + (i64)tile * gridDim.z * (OWN * THREADS) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < OWN; i++) parts[(blockIdx.z * OWN + i) * THREADS] = own[i];
        if (!last_to_arrive(tile, gridDim.z)) return;
#pragma unroll
        for (int i = 0; i < OWN; i++) own[i] = make_float4(0, 0, 0, 0);
#pragma unroll(OWN < 8 ? 8 / OWN : 1)
        for (int z = 0; z < gridDim.z; z++)
#pragma unroll
            for (int i = 0; i < OWN; i++) add(own[i], load_four((float*)&parts[(z * OWN + i) * THREADS]));
    }
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int place = party * OWN + i, output = first_panel * 16 + row + place / TILES * 16 + 2 * g;
        const float one = bias && output < n ? bias[output] : 0.0f, two = bias && output + 1 < n ? bias[output + 1] : 0.0f;
        const float result[4] = {own[i].x + one, own[i].y + one, own[i].z + two, own[i].w + two};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int token = column + place % TILES * 8 + 2 * t + c;
            float* to = out + (first_token + token) * out_stride + output;
            if (token < tokens && output < n) to[0] = result[c];
            if (token < tokens && output + 1 < n) to[1] = result[2 + c];
        }
    }
}

// Blocks of a kernel that a processor runs at a time, where registers suffice: from sm_100 on the compiler needs more.
#define TWO (__CUDA_ARCH__ < 1000 ? 2 : 1)

#define GEMM(NAME, BITS, ROWS, COLUMNS, UNITS, STAGES, ZEROS, BLOCKS)                                                               \
    KERNEL __launch_bounds__(256, BLOCKS)                                                                                           \
    NAME(const u8* x, i64 pitch, const UnitInfo* info, int info_pitch, Weights w, const float* bias, float* out, i64 out_stride,    \
         float4* partials, const i64* state, int tokens_at, int n)                                                                  \
    {                                                                                                                               \
        gemm<BITS, ROWS, COLUMNS, UNITS, STAGES, ZEROS>(x, pitch, info, info_pitch, w, bias, out, out_stride, partials, state,      \
                                                        tokens_at, n);                                                              \
    }
