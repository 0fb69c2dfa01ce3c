// Up to eight tokens times ternary weights: every weight is read once, 16 bytes a lane, straight from the stored panels.
//
// scales, bias, out float32. Four lanes share a step: lane % 4 has four outputs of it, lane / 4 is one of 8 steps. The warps of a block
// share a panel: each has every other group of 8 steps; then comes the block's next panel. One token is quantised here, by every block,
// and fields of two bits are masked where they are, so that their sums come out 4, 16 and 64 times as large. Several tokens: x_codes and
// info come from quantise_tokens.cu, and fields are brought down, once for all of them. Grid: (blocks, groups of TOKENS tokens).
#include "ternary.cuh"

#define UNDER_WAY 4  // groups of 8 steps that a lane asks for before it uses the first

template <int TOKENS>
__device__ __forceinline__ void gemv(const float* x, int k, int activation_bits, const uint4* codes, int steps, const uint4* x_codes,
                                     const TokenInfo* info, const float* scales, const float* bias, float* out, i64 out_stride,
                                     const i64* state, int tokens_at, int n)
{
    constexpr int PARTS = TOKENS == 1 ? 4 : 1;  // sums that are kept apart
    DYNAMIC_SHARED(uint4, own_codes);
    __shared__ i32 sums[2][MOST_WARPS][TOKENS][16];
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_token = blockIdx.y * TOKENS;
    const int tokens = min(TOKENS, (int)state[tokens_at] - first_token), stride = warps * 8, panels = (n + 15) / 16;
    const int first_step = warp * 8 + lane / 4;
    uint4 now[UNDER_WAY];
    const auto fetch = [&](int panel, int step) {
#pragma unroll
        for (int i = 0; i < UNDER_WAY; i++) {
            const bool there = panel < panels && step + i * stride < steps;
            now[i] = there ? load_stream(codes + ((i64)panel * steps + step + i * stride) * 4 + lane % 4) : make_uint4(0, 0, 0, 0);
        }
    };
    fetch(blockIdx.x, first_step);  // weights do not depend on the kernel before
    release_next();
    wait_previous();
    if (tokens <= 0) return;
    TokenInfo own;
    if (TOKENS == 1) {
        own = quantise_token(x, k, steps, activation_bits, (u32*)own_codes);
        x_codes = own_codes;
    } else {
        x_codes += (i64)first_token * steps;
    }
    for (int panel = blockIdx.x, turn = 0; panel < panels; panel += gridDim.x, turn ^= 1) {
        i32 sum[TOKENS][4][PARTS] = {};
        const int rounds = (steps + UNDER_WAY * stride - 1) / (UNDER_WAY * stride);
        for (int round = 0, step = first_step; round < rounds; round++, step += UNDER_WAY * stride) {
#pragma unroll
            for (int i = 0; i < UNDER_WAY; i++) {
                const u32 words[4] = {now[i].x, now[i].y, now[i].z, now[i].w};
                const int at = min(step + i * stride, steps - 1);  // past the end words are 0, which adds nothing
#pragma unroll
                for (int t = 0; t < TOKENS; t++) {
                    const uint4 four = x_codes[(i64)min(t, tokens - 1) * steps + at];  // no branch, so that loads overlap
                    const u32 activations[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
                    for (int o = 0; o < 4; o++)
#pragma unroll
                        for (int f = 0; f < 4; f++) {
                            const u32 field = TOKENS == 1 ? words[o] & 0x03030303u << 2 * f : words[o] >> 2 * f & 0x03030303u;
                            sum[t][o][f % PARTS] = dot_unsigned(field, activations[f], sum[t][o][f % PARTS]);
                        }
                }
            }
            const bool last = round + 1 == rounds;
            fetch(last ? panel + gridDim.x : panel, last ? first_step : step + UNDER_WAY * stride);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
#pragma unroll
            for (int o = 0; o < 4; o++) {
                i32 all = sum[t][o][0];
#pragma unroll
                for (int f = 1; f < PARTS; f++) all += sum[t][o][f] >> 2 * f;
#pragma unroll
                for (int d = 4; d < 32; d <<= 1) all += __shfl_xor_sync(FULL_WARP, all, d);
                if (lane < 4) sums[turn][warp][t][lane * 4 + o] = all;
            }
        __syncthreads();  // the next panel writes the other half, and the one after it comes after the next of these
        for (int i = threadIdx.x; i < tokens * 16; i += blockDim.x) {
            const int output = panel * 16 + i % 16, t = i / 16;
            i32 all = 0;
            for (int w = 0; w < warps; w++) all += sums[turn][w][t][i % 16];
            if (output < n)
                out[(first_token + t) * out_stride + output] =
                    finish(all, TOKENS == 1 ? own : info[first_token + t], scales[output], bias ? bias[output] : 0.0f);
        }
    }
}

#define GEMV(TOKENS)                                                                                                                \
    KERNEL __launch_bounds__(256)                                                                                                   \
    gemv_ternary_##TOKENS(const float* x, int k, int activation_bits, const uint4* codes, int steps, const uint4* x_codes,          \
                          const TokenInfo* info, const float* scales, const float* bias, float* out, i64 out_stride,                \
                          const i64* state, int tokens_at, int n)                                                                   \
    {                                                                                                                               \
        gemv<TOKENS>(x, k, activation_bits, codes, steps, x_codes, info, scales, bias, out, out_stride, state, tokens_at, n);       \
    }

GEMV(1)
GEMV(4)
GEMV(8)
