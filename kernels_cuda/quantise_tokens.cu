// Activations of whole tokens to integers under one factor, for products with ternary weights.
//
// x float32. codes: u32 [tokens, 4 * steps], info: TokenInfo [tokens] (ternary.cuh). Block: 256 threads; grid: (tokens).
#include "ternary.cuh"

KERNEL __launch_bounds__(256) quantise_tokens(const float* x, i64 x_stride, u32* codes, TokenInfo* info, const i64* state, int tokens_at,
                                              int k, int steps, int bits)
{
    const i64 count = state[tokens_at];
    release_next();
    wait_previous();
    const i64 token = blockIdx.x;
    if (token >= count) return;
    const TokenInfo made = quantise_token(x + token * x_stride, k, steps, bits, codes + token * steps * 4);
    if (threadIdx.x == 0) info[token] = made;
}
