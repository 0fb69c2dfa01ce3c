// Up to eight tokens times block-quantised weights: every weight is read once, 16 bytes a lane, straight from the stored panels.
//
// x, out float32; codes u8, scales half, zero points u8 in panels of 16 outputs (see the reference). A unit is 32 K of a panel (16 where
// blocks are 16): 4 bits: 4 steps of 64 bytes, 8 bits: 8. Four lanes share a unit: lane % 4 has four outputs of it, lane / 4 is one of 8
// units. A team of `team` warps shares a panel: each warp has every team-th group of 8 units. What a lane needs next is under way by cp.async
// into a ring of its own in shared memory, STAGES groups, which costs no registers and no barriers. The first groups are asked for before the
// kernel before has ended: weights do not depend on it.
// Grid: (blocks, groups of TOKENS tokens). One token: its activations are quantised here, into shared memory. More: by quantise.cu before.
#include "quantise.cuh"

struct Weights {
    const u8* codes;
    const u16* scales;
    const u8* zero_points;
    int units, block_shift, panels;  // units of a panel; log2 of the units in a block
};

template <int BITS, int UNIT> struct Stage {  // one group of 8 units
    static constexpr int STEPS = UNIT * BITS / 32, BYTES = STEPS * 64;
    uint4 codes[STEPS][32];
    uint2 scales[32];
    u32 zeros[32];
};

template <int BITS, int UNIT>
__device__ __forceinline__ void fetch(Stage<BITS, UNIT>& stage, const Weights& w, int panel, int unit)
{
    using S = Stage<BITS, UNIT>;
    const int lane = threadIdx.x & 31, outputs = lane & 3;
    const bool valid = unit < w.units;           // else zeros: with a scale of 0 they add nothing
    const u8* codes = w.codes + ((i64)panel * w.units + (valid ? unit : 0)) * S::BYTES + outputs * 16;
#pragma unroll
    for (int s = 0; s < S::STEPS; s++) cp_async_or_zeros<16>(&stage.codes[s][lane], codes + s * 64, valid);
    const i64 block = ((i64)panel * (w.units >> w.block_shift) + (valid ? unit >> w.block_shift : 0)) * 16 + outputs * 4;
    cp_async_or_zeros<8>(&stage.scales[lane], w.scales + block, valid);
    if (w.zero_points) cp_async_or_zeros<4>(&stage.zeros[lane], w.zero_points + block, valid);
}

// total[t][o] += the lane's part of a unit; x the unit's codes, those of token t `token_words` words after those of token t - 1
template <int BITS, int UNIT, int TOKENS>
__device__ __forceinline__ void multiply(float (&total)[TOKENS][4], const Stage<BITS, UNIT>& stage, bool has_zeros, const u32* x,
                                         i64 token_words, const UnitInfo* info)
{
    constexpr int STEPS = Stage<BITS, UNIT>::STEPS, WORDS = UNIT / 4;
    constexpr bool SHIFT = BITS == 4 && TOKENS > 1;  // high nibbles brought down once for all tokens; for one, their sum is
    const int lane = threadIdx.x & 31;
    const u32 zeros = has_zeros ? stage.zeros[lane] : BITS == 4 ? 0x08080808 : 0x80808080;
    i32 sum[TOKENS][4], high_sum[4] = {};
    float scale[TOKENS];
    u32 codes[TOKENS][WORDS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const uint2 two = *(const uint2*)(info + t);
        scale[t] = __uint_as_float(two.x);
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) *(uint4*)&codes[t][i] = *(const uint4*)(x + t * token_words + i);
#pragma unroll
        for (int o = 0; o < 4; o++) sum[t][o] = MAGIC - (i32)(zeros >> 8 * o & 255) * (i32)two.y;
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const uint4 four = stage.codes[s][lane];
        const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int o = 0; o < 4; o++) {
            const u32 low = BITS == 4 ? words[o] & 0x0f0f0f0f : words[o];
            const u32 high = SHIFT ? words[o] >> 4 & 0x0f0f0f0f : words[o] & 0xf0f0f0f0;
#pragma unroll
            for (int t = 0; t < TOKENS; t++) {
                sum[t][o] = dot_unsigned(low, codes[t][s], sum[t][o]);
                if (SHIFT) sum[t][o] = dot_unsigned(high, codes[t][STEPS + s], sum[t][o]);
            }
            if (BITS == 4 && !SHIFT) high_sum[o] = dot_unsigned(high, codes[0][STEPS + s], high_sum[o]);
        }
    }
    const uint2 scales = stage.scales[lane];
    const float2 low = halves_to_floats(scales.x), high = halves_to_floats(scales.y);
    const float weight_scale[4] = {low.x, low.y, high.x, high.y};
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int o = 0; o < 4; o++) {
            const float product = __int_as_float(sum[t][o] + (high_sum[o] >> 4)) - MAGIC_FLOAT;
            total[t][o] += product * (weight_scale[o] * scale[t]);
        }
}

struct Out {
    const float* bias;
    float* out;
    i64 stride;
    int n, tokens;
};

// Sums of a panel over the lanes of a warp and the warps of a team, to memory. sums: [team's warps][TOKENS][16], another one the next time.
template <int TOKENS>
__device__ __forceinline__ void finish(float (&total)[TOKENS][4], float* sums, int team, int warp, int barrier, const Out& to, int panel)
{
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int o = 0; o < 4; o++) {
#pragma unroll
            for (int step = 4; step < 32; step <<= 1) total[t][o] += __shfl_xor_sync(FULL_WARP, total[t][o], step);
        }
        if (lane < 4) *(float4*)&sums[(warp * TOKENS + t) * 16 + lane * 4] = make_float4(total[t][0], total[t][1], total[t][2], total[t][3]);
#pragma unroll
        for (int o = 0; o < 4; o++) total[t][o] = 0;
    }
    if (team == 1)
        __syncwarp();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(team * 32) : "memory");
    for (int i = warp * 32 + lane; i < TOKENS * 16; i += team * 32) {
        const int output = panel * 16 + i % 16;
        if (output < to.n && i / 16 < to.tokens) {
            float x = to.bias ? to.bias[output] : 0.0f;
            for (int w = 0; w < team; w++) x += sums[w * TOKENS * 16 + i];
            to.out[i / 16 * to.stride + output] = x;
        }
    }
}

template <int BITS, int UNIT, int TOKENS, int STAGES>
__device__ __forceinline__ void gemv(const float* x, const u32* x_codes, const UnitInfo* x_info, i64 x_pitch, int info_pitch, const Weights& w,
                                     Out to, const i64* state, int tokens_at, int k, int team, int prefetch)
{
    extern __shared__ uint4 shared[];
    using S = Stage<BITS, UNIT>;
    const int warps = blockDim.x / 32, lane = threadIdx.x & 31, block_warp = threadIdx.x / 32, warp = block_warp % team;
    const int teams = warps / team, first_panel = blockIdx.x * teams + block_warp / team, stride = gridDim.x * teams;
    S* ring = (S*)shared + block_warp * STAGES;
    float* sums = (float*)((S*)shared + warps * STAGES) + block_warp / team * 2 * team * TOKENS * 16;
    u32* own_codes = (u32*)((S*)shared + warps * STAGES) + warps * 2 * TOKENS * 16;
    UnitInfo* own_info = (UnitInfo*)(own_codes + w.units * (UNIT / 4));

    const int groups = max(0, (w.units - warp * 8 + team * 8 - 1) / (team * 8));  // of this warp, in a panel
    int next_panel = first_panel, next_group = 0, slot = 0;
    const auto fetch_next = [&](int to_slot) {
        if (next_panel < w.panels && groups > 0) {
            fetch(ring[to_slot], w, next_panel, (next_group * team + warp) * 8 + lane / 4);
            if (++next_group == groups) next_group = 0, next_panel += stride;
        }
        cp_async_commit();
    };
    if (prefetch && warp == 0 && lane == 0 && first_panel < w.panels)
        prefetch_l2_bulk(w.codes + (i64)first_panel * w.units * S::BYTES, w.units * S::BYTES);
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) fetch_next(s);
    release_next();
    wait_previous();
    const int first_token = blockIdx.y * TOKENS;
    to.tokens = (int)state[tokens_at] - first_token;
    to.out += first_token * to.stride;
    if (to.tokens <= 0) {
        cp_async_wait<0>();
        return;
    }
    const u32* codes = own_codes;
    const UnitInfo* info = own_info;
    if (TOKENS == 1) {
        constexpr int PARTS = UNIT / 8, PER_WARP = 32 / PARTS;
#pragma unroll 2
        for (int first = block_warp * PER_WARP; first < w.units; first += warps * PER_WARP) {
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
    for (int panel = first_panel, turn = 0; panel < w.panels; panel += stride, turn ^= 1) {
        for (int group = 0; group < groups; group++) {
            cp_async_wait<STAGES - 2>();
            const int unit = min((group * team + warp) * 8 + lane / 4, w.units - 1);
            multiply<BITS, UNIT, TOKENS>(total, ring[slot], w.zero_points != nullptr, codes + unit * (UNIT / 4), x_pitch, info + (i64)unit * info_pitch);
            fetch_next(slot == 0 ? STAGES - 1 : slot - 1);  // into what was used up one group ago
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }
        finish<TOKENS>(total, sums + turn * team * TOKENS * 16, team, warp, 1 + block_warp / team, to, panel);
    }
}

#define GEMV(BITS, UNIT, TOKENS, STAGES, BLOCKS)                                                                                  \
    KERNEL __launch_bounds__(256, BLOCKS) gemv_##BITS##_##UNIT##_##TOKENS(                                                        \
        const float* x, const u32* x_codes, const UnitInfo* x_info, i64 x_pitch, int info_pitch, Weights w, const float* bias,    \
        float* out, i64 out_stride, const i64* state, int tokens_at, int k, int n, int team, int prefetch)                        \
    {                                                                                                                             \
        gemv<BITS, UNIT, TOKENS, STAGES>(x, x_codes, x_info, x_pitch, info_pitch, w, {bias, out, out_stride, n, 0}, state,        \
                                         tokens_at, k, team, prefetch);                                                           \
    }

GEMV(4, 32, 1, 4, 2)
GEMV(4, 32, 4, 4, 2)
GEMV(4, 32, 8, 4, 1)
GEMV(8, 32, 1, 3, 2)
GEMV(8, 32, 4, 3, 2)
GEMV(8, 32, 8, 3, 1)
GEMV(4, 16, 1, 4, 2)
GEMV(4, 16, 8, 4, 1)
GEMV(8, 16, 1, 4, 2)
GEMV(8, 16, 8, 4, 1)
