// x times a float32 or half weight [n, k], transposed, plus bias.
//
// gemv: up to TOKENS tokens; a warp OUTPUTS outputs, which share what it reads of x, 16 bytes of the weight a lane. Grid: (outputs /
// WARPS / OUTPUTS, groups of tokens).
// gemm: tiles of 64 tokens x 64 outputs, 16 of K at a time in shared memory, 4 x 4 sums a thread. Grid: (outputs / 64, tokens / 64).
#include "common.cuh"

#define WARPS 8
#define TILE 64
#define DEPTH 16

template <bool HALF> __device__ __forceinline__ float weight_at(const void* weight, i64 i)
{
    return HALF ? half_to_float(((const u16*)weight)[i]) : ((const float*)weight)[i];
}

// the weights of 16 bytes as floats
template <bool HALF> __device__ __forceinline__ void unpack(float (&w)[HALF ? 8 : 4], const uint4& v)
{
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (HALF) {
            const float2 two = halves_to_floats(words[i]);
            w[i * 2 % (HALF ? 8 : 4)] = two.x, w[(i * 2 + 1) % (HALF ? 8 : 4)] = two.y;
        } else {
            w[i] = __uint_as_float(words[i]);
        }
    }
}

template <bool HALF, int TOKENS, int OUTPUTS>
__device__ __forceinline__ void gemv(const float* x, i64 x_stride, const void* weight, i64 weight_stride, const float* bias, float* out,
                                     i64 out_stride, const i64* state, int tokens_at, int n, int k, int aligned)
{
    constexpr int EACH = HALF ? 8 : 4, SIZE = HALF ? 2 : 4;  // weights in 16 bytes
    const int output = (blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS, lane = threadIdx.x % 32, first_token = blockIdx.y * TOKENS;
    const int tokens = min((int)state[tokens_at] - first_token, TOKENS);
    release_next();
    wait_previous();
    if (tokens <= 0 || output >= n) return;
    x += first_token * x_stride;
    const u8* rows[OUTPUTS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++) rows[o] = (const u8*)weight + min(output + o, n - 1) * weight_stride * SIZE;
    float sum[TOKENS][OUTPUTS] = {};
    const int whole = aligned ? k / EACH * EACH : 0;
#pragma unroll(4 / OUTPUTS)
    for (int at = lane * EACH; at < whole; at += 32 * EACH) {
        uint4 v[OUTPUTS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) v[o] = load_stream(rows[o] + at * SIZE);
        float w[OUTPUTS][EACH];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) unpack<HALF>(w[o], v[o]);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (t >= tokens) continue;
#pragma unroll
            for (int i = 0; i < EACH; i += 4) {
                const float4 y = *(const float4*)(x + t * x_stride + at + i);
#pragma unroll
                for (int o = 0; o < OUTPUTS; o++)
                    sum[t][o] += w[o][i] * y.x + w[o][i + 1] * y.y + (w[o][i + 2] * y.z + w[o][i + 3] * y.w);
            }
        }
    }
    for (int at = whole + lane; at < k; at += 32) {
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            const float w = weight_at<HALF>(rows[o], at);
#pragma unroll
            for (int t = 0; t < TOKENS; t++)
                if (t < tokens) sum[t][o] += w * x[t * x_stride + at];
        }
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++)
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) {
            const float total = warp_sum(sum[t][o]);
            if (lane == 0 && t < tokens && output + o < n)
                out[(first_token + t) * out_stride + output + o] = total + (bias ? bias[output + o] : 0.0f);
        }
}

template <bool HALF>
__device__ __forceinline__ void gemm(const float* x, i64 x_stride, const void* weight, i64 weight_stride, const float* bias, float* out,
                                     i64 out_stride, const i64* state, int tokens_at, int n, int k)
{
    __shared__ float own_x[DEPTH][TILE + 4], own_w[DEPTH][TILE + 4];  // 4 more: neither stores nor 16-byte loads of a warp share banks
    const int first_output = blockIdx.x * TILE, first_token = blockIdx.y * TILE, column = threadIdx.x % 16 * 4, row = threadIdx.x / 16 * 4;
    const int tokens = (int)state[tokens_at] - first_token;
    release_next();
    wait_previous();
    if (tokens <= 0) return;
    float sum[4][4] = {};
    for (int start = 0; start < k; start += DEPTH) {
#pragma unroll
        for (int i = threadIdx.x; i < TILE * DEPTH; i += 256) {
            const int at = start + i % DEPTH, line = i / DEPTH;
            own_x[i % DEPTH][line] = at < k && line < tokens ? x[(first_token + line) * x_stride + at] : 0.0f;
            const bool valid = at < k && first_output + line < n;
            own_w[i % DEPTH][line] = valid ? weight_at<HALF>(weight, (first_output + line) * weight_stride + at) : 0.0f;
        }
        __syncthreads();
        float part[4][4] = {};          // short sums, which keeps float32 accurate
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const float4 a = *(const float4*)&own_x[d][row], b = *(const float4*)&own_w[d][column];
            const float left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) part[i][j] += left[i] * right[j];
        }
#pragma unroll
        for (int i = 0; i < 16; i++) sum[i / 4][i % 4] += part[i / 4][i % 4];
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (row + i < tokens && first_output + column + j < n)
                out[(first_token + row + i) * out_stride + first_output + column + j] =
                    sum[i][j] + (bias ? bias[first_output + column + j] : 0.0f);
}

#define PARAMETERS const float *x, i64 x_stride, const void *weight, i64 weight_stride, const float *bias, float *out, i64 out_stride, \
                   const i64 *state, int tokens_at, int n, int k, int aligned
#define GEMV(NAME, HALF, TOKENS, OUTPUTS, BLOCKS) KERNEL __launch_bounds__(WARPS * 32, BLOCKS) NAME(PARAMETERS) \
    { gemv<HALF, TOKENS, OUTPUTS>(x, x_stride, weight, weight_stride, bias, out, out_stride, state, tokens_at, n, k, aligned); }
#define GEMM(NAME, HALF) KERNEL __launch_bounds__(256) NAME(PARAMETERS) \
    { gemm<HALF>(x, x_stride, weight, weight_stride, bias, out, out_stride, state, tokens_at, n, k); }

GEMV(gemv_f32_1, false, 1, 1, 5)
GEMV(gemv_f32_8, false, 8, 4, 1)
GEMV(gemv_f16_1, true, 1, 1, 5)
GEMV(gemv_f16_8, true, 8, 4, 1)
GEMM(gemm_f32, false)
GEMM(gemm_f16, true)
