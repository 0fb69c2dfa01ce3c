// Codes of 4 and 8 bits, whose zero points are bytes, or none: what most models have.
#include "gemm_nbits.cuh"

GEMM(gemm_4, 4, 64, 128, 4, NONE, 2)
GEMM(gemm_8, 8, 64, 128, 4, NONE, 2)
GEMM(gemm_4_zeros, 4, 64, 128, 4, BYTES, 1)
GEMM(gemm_8_zeros, 8, 64, 128, 4, BYTES, 1)
