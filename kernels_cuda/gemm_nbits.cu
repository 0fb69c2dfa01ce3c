// Codes of 4 and 8 bits, without zero points: what most models have.
#include "gemm_nbits.cuh"

GEMM(gemm_4_16, 4, 64, 16, 4, 4, NONE, 3)
GEMM(gemm_4_32, 4, 64, 32, 4, 4, NONE, 2)
GEMM(gemm_4_64, 4, 64, 64, 4, 4, NONE, TWO)
GEMM(gemm_4_128, 4, 64, 128, 2, 4, NONE, TWO)
GEMM(gemm_8_16, 8, 64, 16, 4, 4, NONE, 3)
GEMM(gemm_8_32, 8, 64, 32, 4, 4, NONE, 2)
GEMM(gemm_8_64, 8, 64, 64, 4, 4, NONE, TWO)
GEMM(gemm_8_128, 8, 64, 128, 2, 4, NONE, TWO)
