// Up to eight tokens times block-quantised weights: every weight is read once, 16 bytes a lane, straight from the stored panels.
//
// x, out float32; codes u8, scales half, zero points u8 or half in panels of 16 outputs (see the reference). A unit is 32 K of a panel (16
// where blocks are 16): BITS steps of 64 bytes (half as many). Four lanes share a unit: lane % 4 has four outputs of it, lane / 4 is one of
// 8 units. A team of `team` warps shares a panel: each warp has every team-th group of 8 units. What a lane needs next is under way by
// cp.async into a ring of its own in shared memory, STAGES groups, which costs no registers and no barriers. The first groups are asked
// for before the kernel before has ended: weights do not depend on it.
// Grid: (blocks, groups of TOKENS tokens). One token: its activations are quantised here, into shared memory, and steps around the product
// may be part of it (gemv_around.cuh). More: by quantise.cu before.
#pragma once
#include "gemv_around.cuh"
#include "panels.cuh"

#define EARLY 1  // groups of a ring that are asked for before the kernel before has ended

// Zero points of a lane's four outputs: bytes, or where ANY are taken halves too.
template <bool ANY> struct Zeros {
    u32 bytes;
};
template <> struct Zeros<true> {
    u32 bytes, more;
};

template <int BITS, int UNIT, bool ANY> struct Stage {  // one group of 8 units
    static constexpr int STEPS = UNIT * BITS / 32, BYTES = STEPS * 64;
    uint4 codes[STEPS][32];
    uint2 scales[32];
    Zeros<ANY> zeros[32];
};

// Where a lane is in the weights that its warp is to fetch, in the order in which they are used: groups of a panel, then the next panel.
template <int BITS, int UNIT, bool ANY> struct Cursor {
    using S = Stage<BITS, UNIT, ANY>;
    const u8* codes;
    i64 block;       // of the panel's first, in scales and zero points
    int unit, place, stride, step, half;  // places of panels (gemv_around.cuh); units from one group to the next

    __device__ __forceinline__ void begin(const Weights& w, int first_unit)
    {
        const int outputs = threadIdx.x & 3, panel = panel_of(place, half);
        unit = first_unit;
        codes = w.codes + ((i64)panel * w.units + unit) * S::BYTES + outputs * 16;
        block = (i64)panel * (w.units >> w.block_shift) * 16 + outputs * 4;
    }

    // Units past the end are zeros: with a scale of 0 they add nothing.
    __device__ __forceinline__ void fetch(S& stage, const Weights& w, int first_unit)
    {
        const int lane = threadIdx.x & 31;
        if (place < w.panels) {
            const bool valid = unit < w.units;
#pragma unroll
            for (int s = 0; s < S::STEPS; s++) {
                const u8* from = codes + s * 64;
                if (BITS == 3) {
                    const int outputs = (lane & 3) * 16, panel = panel_of(place, half);
                    from = w.codes + outputs + (s == 2 ? third_step(w, panel, unit) : low_steps(w, panel, unit) + s * 64);
                }
                cp_async16_stream_or_zeros(&stage.codes[s][lane], from, valid);
            }
            const i64 at = block + (unit >> w.block_shift) * 16;
            cp_async_or_zeros<8>(&stage.scales[lane], w.scales + at, valid);
            if (ANY && w.zero_points && w.halves) cp_async_or_zeros<8>(&stage.zeros[lane], w.zero_points + 2 * at, valid);
            else if (w.zero_points) cp_async_or_zeros<4>(&stage.zeros[lane], w.zero_points + at, valid);
            unit += step;
            codes += step * S::BYTES;
            if (unit - (lane >> 2) >= w.units) {  // the same for all lanes
                place = next_place(place, half, stride);
                begin(w, first_unit);
            }
        }
        cp_async_commit();
    }
};

// total[t][o] += the lane's part of a unit; x the unit's codes, those of token t `token_words` words after those of token t - 1
template <int BITS, int UNIT, int TOKENS, bool ANY>
__device__ __forceinline__ void multiply(float (&total)[TOKENS][4], const Stage<BITS, UNIT, ANY>& stage, const Weights& w, const u32* x,
                                         i64 token_words, const UnitInfo* info)
{
    constexpr int STEPS = Stage<BITS, UNIT, ANY>::STEPS, WORDS = UNIT / 4;
    const bool has_zeros = w.zero_points != nullptr, halves = ANY && has_zeros && w.halves;
    constexpr bool SHIFT = BITS == 4 && TOKENS > 1;  // high nibbles brought down once for all tokens; for one, their sum is
    const int lane = threadIdx.x & 31;
    i32 sum[TOKENS][4], high_sum[4] = {};
    float scale[TOKENS], x_sum[TOKENS];
    u32 codes[TOKENS][WORDS];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const uint2 two = *(const uint2*)(info + t);
        scale[t] = __uint_as_float(two.x);
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) *(uint4*)&codes[t][i] = *(const uint4*)(x + t * token_words + i);
#pragma unroll
        for (int o = 0; o < 4; o++) sum[t][o] = (i32)two.y;
        if (ANY) x_sum[t] = (float)(MAGIC - (i32)two.y >> BITS - 1);
    }
    if (has_zeros && !halves) {
        const u32 zeros = stage.zeros[lane].bytes;
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
#pragma unroll
            for (int o = 0; o < 4; o++) sum[t][o] = start_of<BITS>(sum[t][o], zeros >> 8 * o & 255);
    }
    if (BITS < 4) {
        const uint4 top = stage.codes[STEPS - 1][lane];
        const u32 third[4] = {top.x, top.y, top.z, top.w};
#pragma unroll
        for (int s = 0; s < UNIT / 16; s++) {
            const uint4 four = stage.codes[s][lane];
            const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int o = 0; o < 4; o++)
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const u32 own = four_codes<BITS>(words[o], third[o], s, p);
#pragma unroll
                    for (int t = 0; t < TOKENS; t++) sum[t][o] = dot_unsigned(own, codes[t][4 * s + p], sum[t][o]);
                }
        }
    }
#pragma unroll
    for (int s = 0; BITS >= 4 && s < STEPS; s++) {
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
    float zero[4] = {};  // over the default
    if (ANY && halves) {
        const Zeros<true> four = *(const Zeros<true>*)&stage.zeros[lane];
        const float2 a = halves_to_floats(four.bytes), b = halves_to_floats(four.more);
        zero[0] = a.x - ZERO<BITS>, zero[1] = a.y - ZERO<BITS>, zero[2] = b.x - ZERO<BITS>, zero[3] = b.y - ZERO<BITS>;
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int o = 0; o < 4; o++) {
            float product = __int_as_float(sum[t][o] + (high_sum[o] >> 4)) - MAGIC_FLOAT;
            if (ANY) product = fmaf(-zero[o], x_sum[t], product);
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
// other: what is added to this thread's output of the panel; gate: its output of the panel before.
template <int TOKENS>
__device__ __forceinline__ void finish(float (&total)[TOKENS][4], float* sums, int team, int warp, int barrier, const Out& to, int panel,
                                       const Around& around, float other, float& gate)
{
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
#pragma unroll
        for (int o = 0; o < 4; o++) {
#pragma unroll
            for (int step = 4; step < 32; step <<= 1) total[t][o] += __shfl_xor_sync(FULL_WARP, total[t][o], step);
        }
        const float4 four = make_float4(total[t][0], total[t][1], total[t][2], total[t][3]);
        if (lane < 4) *(float4*)&sums[(warp * TOKENS + t) * 16 + lane * 4] = four;
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
            if (TOKENS == 1 && around.sum) around.sum[output] = x + other;
            if (TOKENS == 1 && panel >= around.half && around.gated)
                around.gated[output - 16 * around.half] = activate(gate, around.activation) * x;
            gate = x;
        }
    }
}

template <int BITS, int UNIT, int TOKENS, int STAGES, bool ANY>
__device__ __forceinline__ void gemv(const float* x, const u32* x_codes, const UnitInfo* x_info, i64 x_pitch, int info_pitch,
                                     const Weights& w, Out to, const i64* state, int tokens_at, int k, int team_shift, const Around& around)
{
    DYNAMIC_SHARED(uint4, shared);
    using S = Stage<BITS, UNIT, ANY>;
    const int warps = blockDim.x / 32, lane = threadIdx.x & 31, block_warp = threadIdx.x / 32;
    const int team = 1 << team_shift, warp = block_warp & team - 1, own_team = block_warp >> team_shift;
    const int teams = warps >> team_shift, first_team = blockIdx.x * teams + own_team, stride = gridDim.x * teams;
    S* ring = (S*)shared + block_warp * STAGES;
    float* sums = (float*)((S*)shared + warps * STAGES) + own_team * 2 * team * TOKENS * 16;
    const int first_place = TOKENS == 1 && around.half ? 2 * first_team : first_team, half = TOKENS == 1 ? around.half : 0;
    u32* own_codes = (u32*)((S*)shared + warps * STAGES) + warps * 2 * TOKENS * 16;
    UnitInfo* own_info = (UnitInfo*)(own_codes + w.units * (UNIT / 4));

    // of this warp, in a panel
    const int first_unit = warp * 8 + lane / 4, groups = max(0, w.units - warp * 8 + team * 8 - 1 >> 3 + team_shift);
    Cursor<BITS, UNIT, ANY> cursor;
    cursor.place = groups > 0 ? first_place : w.panels, cursor.half = half, cursor.stride = stride, cursor.step = team * 8;
    cursor.begin(w, first_unit);
#pragma unroll
    for (int s = 0; s < min(EARLY, STAGES - 1); s++) cursor.fetch(ring[s], w, first_unit);
    // Only EARLY groups are asked for before the activations, which would have to wait behind them.
    const int first_token = blockIdx.y * TOKENS;
    to.tokens = (int)state[tokens_at] - first_token;
    if (TOKENS == 1 && around.gain && 32 * threadIdx.x < k) prefetch_l2(around.gain + 32 * threadIdx.x);
    release_next();
    wait_previous();
    to.out += first_token * to.stride;
    if (to.tokens <= 0) {
        cp_async_wait<0>();
        return;
    }
    const auto fetch_rest = [&] {
#pragma unroll
        for (int s = min(EARLY, STAGES - 1); s < STAGES - 1; s++) cursor.fetch(ring[s], w, first_unit);
    };
    const u32* codes = own_codes;
    const UnitInfo* info = own_info;
    if (TOKENS == 1) {
        float* warp_sums = (float*)((S*)shared + warps * STAGES);
        quantise_own<BITS, UNIT>(x, around, k, w.units, w.block_shift, own_codes, own_info, warp_sums, fetch_rest);
    } else {
        fetch_rest();
        codes = x_codes + first_token * x_pitch;
        info = x_info + first_token;
    }

    float total[TOKENS][4] = {};
    float gate = 0, other = 0;
    int slot = 0;
    for (int place = first_place, turn = 0; place < w.panels; place = next_place(place, half, stride), turn ^= 1) {
        const int panel = panel_of(place, half), output = panel * 16 + lane % 16;
        if (TOKENS == 1 && around.other && warp == 0) other = output < to.n ? around.other[output] : 0.0f;  // before it is waited for
        for (int group = 0; group < groups; group++) {
            cp_async_wait<STAGES - 2>();
            const int unit = min((group * team + warp) * 8 + lane / 4, w.units - 1);
            multiply<BITS, UNIT, TOKENS, ANY>(total, ring[slot], w, codes + unit * (UNIT / 4), x_pitch, info + (i64)unit * info_pitch);
            cursor.fetch(ring[slot == 0 ? STAGES - 1 : slot - 1], w, first_unit);  // into what was used up one group ago
            slot = slot == STAGES - 1 ? 0 : slot + 1;
        }
        finish<TOKENS>(total, sums + turn * team * TOKENS * 16, team, warp, 1 + own_team, to, panel, around, other, gate);
    }
}

#define GEMV(NAME, BITS, UNIT, TOKENS, STAGES, BLOCKS, ANY)                                                                       \
    KERNEL __launch_bounds__(256, BLOCKS) NAME(                                                                                   \
        const float* x, const u32* x_codes, const UnitInfo* x_info, i64 x_pitch, int info_pitch, Weights w, const float* bias,    \
        float* out, i64 out_stride, const i64* state, int tokens_at, int k, int n, int team_shift, Around around)                 \
    {                                                                                                                             \
        gemv<BITS, UNIT, TOKENS, STAGES, ANY>(x, x_codes, x_info, x_pitch, info_pitch, w, {bias, out, out_stride, n, 0}, state,   \
                                              tokens_at, k, team_shift, around);                                                  \
    }
