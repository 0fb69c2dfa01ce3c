// Ternary weights of two bits, w + 2, in panels of 16 outputs (see the reference of matmul_ternary): a step is 64 bytes, a word of 4 bytes
// for each output; field f (bits 2f, 2f + 1) of byte j is k = 4 * j + f of the step's 16.
#pragma once
#include "common.cuh"

#define CENTRE 2  // the code of a weight 0

// What a token's sums need besides its codes.
struct TokenInfo {
    float factor;  // by which the token was multiplied
    i32 centre;    // CENTRE * sum of its codes
};

// What a sum of codes' products stands for.
__device__ __forceinline__ float finish(i32 sum, TokenInfo token, float scale, float bias)
{
    return __fdiv_rn((float)(sum - token.centre), token.factor) * scale + bias;
}
