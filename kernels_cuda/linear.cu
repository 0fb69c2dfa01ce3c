// x times a float32 or half weight [n, k], transposed, plus bias.
//
// linear_gemv: up to TOKENS tokens; a warp an output, 16 bytes of the weight a lane. Grid: (outputs / WARPS, groups of tokens).
// linear_gemm: tiles of 64 tokens x 64 outputs, 16 of K at a time in shared memory, 4 x 4 sums a thread. Grid: (outputs / 64, tokens / 64).
#include "common.cuh"

#define WARPS 8
#define TILE 64
#define DEPTH 16

template <bool HALF> __device__ __forceinline__ float weight_at(const void* weight, i64 i)
{
    return HALF ? half_to_float(((const u16*)weight)[i]) : ((const float*)weight)[i];
}

template <bool HALF, int TOKENS>
__device__ __forceinline__ void gemv(const float* x, i64 x_stride, const void* weight, i64 weight_stride, const float* bias, float* out,
                                     i64 out_stride, const i64* state, int tokens_at, int n, int k, int aligned)
{
    constexpr int EACH = HALF ? 8 : 4, SIZE = HALF ? 2 : 4;  // weights in 16 bytes
    const int output = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, first_token = blockIdx.y * TOKENS;
    const int tokens = min((int)state[tokens_at] - first_token, TOKENS);
    release_next();
    wait_previous();
    if (tokens <= 0 || output >= n) return;
    x += first_token * x_stride;
    const u8* row = (const u8*)weight + output * weight_stride * SIZE;
    float sum[TOKENS] = {};
    const int whole = aligned ? k / EACH * EACH : 0;
#pragma unroll 4
    for (int at = lane * EACH; at < whole; at += 32 * EACH) {
        const uint4 v = load_stream(row + at * SIZE);
        float w[EACH];
        if (HALF) {
            const float2 a = halves_to_floats(v.x), b = halves_to_floats(v.y), c = halves_to_floats(v.z), d = halves_to_floats(v.w);
            const float all[8] = {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
#pragma unroll
            for (int i = 0; i < EACH; i++) w[i] = all[i];
        } else {
            const float all[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
            for (int i = 0; i < EACH; i++) w[i] = all[i % 4];
        }
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            if (t >= tokens) continue;
#pragma unroll
            for (int i = 0; i < EACH; i += 4) {
                const float4 y = *(const float4*)(x + t * x_stride + at + i);
                sum[t] += w[i] * y.x + w[i + 1] * y.y + (w[i + 2] * y.z + w[i + 3] * y.w);
            }
        }
    }
    for (int at = whole + lane; at < k; at += 32) {
        const float w = weight_at<HALF>(row, at);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            if (t < tokens) sum[t] += w * x[t * x_stride + at];
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        const float total = warp_sum(sum[t]);
        if (lane == 0 && t < tokens) out[(first_token + t) * out_stride + output] = total + (bias ? bias[output] : 0.0f);
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
#define GEMV(NAME, HALF, TOKENS) KERNEL __launch_bounds__(WARPS * 32) NAME(PARAMETERS) \
    { gemv<HALF, TOKENS>(x, x_stride, weight, weight_stride, bias, out, out_stride, state, tokens_at, n, k, aligned); }
#define GEMM(NAME, HALF) KERNEL __launch_bounds__(256) NAME(PARAMETERS) \
    { gemm<HALF>(x, x_stride, weight, weight_stride, bias, out, out_stride, state, tokens_at, n, k); }

GEMV(gemv_f32_1, false, 1)
GEMV(gemv_f32_8, false, 8)
GEMV(gemv_f16_1, true, 1)
GEMV(gemv_f16_8, true, 8)
GEMM(gemm_f32, false)
GEMM(gemm_f16, true)
