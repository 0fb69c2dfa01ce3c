// Up to eight tokens times block-quantised weights: every weight is read once, 16 bytes a lane, straight from the stored panels.
//
// x, out float32; codes u8, scales half, zero points u8 in panels of 16 outputs (see the reference). A unit is 32 K of a panel (16 where blocks
// are 16): 4 bits: 4 steps of 64 bytes, 8 bits: 8. Four lanes share a unit: lane % 4 has four outputs of it, lane / 4 says which of 8 units.
// A team of `team` warps shares a panel, each warp every team-th group of 8 units; a block has blockDim.x / 32 / team teams.
// Grid: (blocks, groups of TOKENS tokens). One token: its activations are quantised here, into shared memory. More: by quantise.cu before.
#include "quantise.cuh"

struct Weights {
    const u8* codes;
    const u16* scales;
    const u8* zero_points;
    int units, block_shift, panels;  // units of a panel; log2 of the units in a block
};

template <int BITS, int UNIT> struct Piece {  // what one lane has of a unit
    static constexpr int STEPS = UNIT * BITS / 32, BYTES = STEPS * 64;
    uint4 codes[STEPS];
    uint2 scales;
    u32 zeros;
};

template <int BITS, int UNIT>
__device__ __forceinline__ void fetch(Piece<BITS, UNIT>& piece, const Weights& w, int panel, int unit, int outputs)
{
    using P = Piece<BITS, UNIT>;
    const u8* codes = w.codes + ((i64)panel * w.units + unit) * P::BYTES + outputs * 16;
#pragma unroll
    for (int s = 0; s < P::STEPS; s++) piece.codes[s] = load_stream(codes + s * 64);
    const i64 block = ((i64)panel * (w.units >> w.block_shift) + (unit >> w.block_shift)) * 16 + outputs * 4;
    piece.scales = load_stream8(w.scales + block);
    piece.zeros = w.zero_points ? *(const u32*)(w.zero_points + block) : (BITS == 4 ? 0x08080808 : 0x80808080);
}

// total[t][o] += the unit's products; x the units' codes of token t `token_words` words after those of token t - 1, info likewise
template <int BITS, int UNIT, int TOKENS>
__device__ __forceinline__ void multiply(float (&total)[TOKENS][4], const Piece<BITS, UNIT>& piece, const u32* x, i64 token_words, const UnitInfo* info)
{
    constexpr int STEPS = Piece<BITS, UNIT>::STEPS, WORDS = UNIT / 4;
    constexpr bool SHIFT = BITS == 4 && TOKENS > 1;  // high nibbles brought down once for all tokens; for one, their sum is
    i32 sum[TOKENS][4], high_sum[4] = {};
    float scale[TOKENS];
    u32 codes[TOKENS][WORDS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        scale[t] = info[t].scale;
        const i32 codes_sum = info[t].sum;
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) *(uint4*)&codes[t][i] = *(const uint4*)(x + t * token_words + i);
#pragma unroll
        for (int o = 0; o < 4; o++) sum[t][o] = MAGIC - (i32)(piece.zeros >> 8 * o & 255) * codes_sum;
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const u32 words[4] = {piece.codes[s].x, piece.codes[s].y, piece.codes[s].z, piece.codes[s].w};
#pragma unroll
        for (int o = 0; o < 4; o++) {
            const u32 low = BITS == 4 ? words[o] & 0x0f0f0f0f : words[o], high = SHIFT ? words[o] >> 4 & 0x0f0f0f0f : words[o] & 0xf0f0f0f0;
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                sum[t][o] = dot_unsigned(low, codes[t][s], sum[t][o]);
                if (SHIFT) sum[t][o] = dot_unsigned(high, codes[t][STEPS + s], sum[t][o]);
            }
            if (BITS == 4 && !SHIFT) high_sum[o] = dot_unsigned(high, codes[0][STEPS + s], high_sum[o]);
        }
    }
    const float2 low = halves_to_floats(piece.scales.x), high = halves_to_floats(piece.scales.y);
    const float weight_scale[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int o = 0; o < 4; o++) total[t][o] += (__int_as_float(sum[t][o] + (high_sum[o] >> 4)) - MAGIC_FLOAT) * (weight_scale[o] * scale[t]);
}

// Sums of a panel over the lanes of a warp and the warps of a team, to `out`. shared: [team][2][team's warps][TOKENS][16], turn by turn.
template <int TOKENS>
__device__ __forceinline__ void finish(float (&total)[TOKENS][4], float* shared, int team, int warp, int barrier, const float* bias, float* out,
                                       i64 out_stride, int panel, int n, int tokens)
{
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int o = 0; o < 4; o++) {
            float x = total[t][o];
#pragma unroll
            for (int step = 4; step < 32; step <<= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
            if (lane < 4) shared[(warp * TOKENS + t) * 16 + lane * 4 + o] = x;
            total[t][o] = 0;
        }
    }
    if (team == 1)
        __syncwarp();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(team * 32) : "memory");
    for (int i = warp * 32 + lane; i < TOKENS * 16; i += team * 32) {
        const int output = panel * 16 + i % 16;
        if (output < n && i / 16 < tokens) {
            float x = bias ? bias[output] : 0.0f;
            for (int w = 0; w < team; w++) x += shared[w * TOKENS * 16 + i];
            out[i / 16 * out_stride + output] = x;
        }
    }
}

template <int BITS, int UNIT, int TOKENS>
__device__ __forceinline__ void gemv(const float* x, const u32* x_codes, const UnitInfo* x_info, i64 x_pitch, int info_pitch, const Weights& w,
                                     const float* bias, float* out, i64 out_stride, const i64* state, int tokens_at, int k, int n, int team)
{
    extern __shared__ uint4 shared[];
    const int warps = blockDim.x / 32, lane = threadIdx.x & 31, block_warp = threadIdx.x / 32;
    const int warp = block_warp % team, unit_of_lane = warp * 8 + lane / 4, outputs = lane % 4, stride = gridDim.x * (warps / team);
    int panel = blockIdx.x * (warps / team) + block_warp / team;
    float* sums = (float*)shared + (block_warp / team) * 2 * team * TOKENS * 16;
    u32* own_codes = (u32*)shared + warps * 2 * TOKENS * 16;
    UnitInfo* own_info = (UnitInfo*)(own_codes + w.units * (UNIT / 4));

    Piece<BITS, UNIT> piece;             // the first weights are under way before the step before has ended
    if (panel < w.panels && unit_of_lane < w.units) fetch(piece, w, panel, unit_of_lane, outputs);
    release_next();
    wait_previous();
    const int first_token = blockIdx.y * TOKENS, tokens = (int)state[tokens_at] - first_token;
    if (tokens <= 0) return;

    const u32* codes = own_codes;
    const UnitInfo* info = own_info;
    if (TOKENS == 1 && x_codes == nullptr) {
        constexpr int PARTS = UNIT / 8, PER_WARP = 32 / PARTS;
        const int whole = (w.units + PER_WARP - 1) / PER_WARP * PER_WARP;
        for (int first = block_warp * PER_WARP; first < whole; first += warps * PER_WARP) {
            const int unit = first + lane / PARTS;
            const bool valid = unit < w.units;
            const UnitInfo made = quantise_unit<BITS, UNIT>(x, unit, lane % PARTS, k, w.block_shift, own_codes + unit * (UNIT / 4), valid);
            if (valid && lane % PARTS == 0) own_info[unit] = made;
        }
        __syncthreads();
    } else {
        codes = x_codes + first_token * x_pitch;
        info = x_info + first_token;
    }

    float total[TOKENS][4] = {};
    for (int turn = 0; panel < w.panels; turn ^= 1) {
        for (int unit = unit_of_lane; unit < w.units; unit += team * 8) {
            const Piece<BITS, UNIT> now = piece;
            const bool last = unit + team * 8 >= w.units;   // of this lane in the panel; then the next panel's first
            const int next_panel = last ? panel + stride : panel, next_unit = last ? unit_of_lane : unit + team * 8;
            if (next_panel < w.panels) fetch(piece, w, next_panel, next_unit, outputs);
            multiply<BITS, UNIT, TOKENS>(total, now, codes + unit * (UNIT / 4), x_pitch, info + (i64)unit * info_pitch);
        }
        finish<TOKENS>(total, sums + turn * team * TOKENS * 16, team, warp, 1 + block_warp / team, bias, out + first_token * out_stride, out_stride,
                       panel, n, tokens);
        panel += stride;
    }
}

#define GEMV(BITS, UNIT, TOKENS, ...)                                                                                                   \
    KERNEL __launch_bounds__(__VA_ARGS__)                                                                                                    \
    gemv_##BITS##_##UNIT##_##TOKENS(const float* x, const u32* x_codes, const UnitInfo* x_info, i64 x_pitch, int info_pitch, Weights w,     \
                                    const float* bias, float* out, i64 out_stride, const i64* state, int tokens_at, int k, int n, int team) \
    {                                                                                                                                       \
        gemv<BITS, UNIT, TOKENS>(x, x_codes, x_info, x_pitch, info_pitch, w, bias, out, out_stride, state, tokens_at, k, n, team);          \
    }

GEMV(4, 32, 1, 256, 2)
GEMV(4, 32, 2, 256, 2)
GEMV(4, 32, 4, 256, 1)
GEMV(4, 32, 8, 256, 1)
GEMV(8, 32, 1, 256, 2)
GEMV(8, 32, 2, 256, 1)
GEMV(8, 32, 4, 256, 1)
GEMV(8, 32, 8, 256, 1)
GEMV(4, 16, 1, 256, 2)
GEMV(4, 16, 8, 256, 1)
GEMV(8, 16, 1, 256, 2)
GEMV(8, 16, 8, 256, 1)
