// Codes of 2 and 3 bits, without zero points or with bytes.
#include "gemm_nbits.cuh"

GEMM(gemm_2_16, 2, 64, 16, 4, 4, NONE, 3)
GEMM(gemm_2_32, 2, 64, 32, 4, 4, NONE, 2)
GEMM(gemm_2_64, 2, 64, 64, 4, 4, NONE, TWO)
GEMM(gemm_2_128, 2, 64, 128, 2, 4, NONE, TWO)
GEMM(gemm_3_16, 3, 64, 16, 4, 4, NONE, 3)
GEMM(gemm_3_32, 3, 64, 32, 4, 4, NONE, 2)
GEMM(gemm_3_64, 3, 64, 64, 4, 4, NONE, 1)
GEMM(gemm_3_128, 3, 64, 128, 2, 4, NONE, 1)
GEMM(gemm_2_zeros_16, 2, 64, 16, 4, 4, BYTES, 3)
GEMM(gemm_2_zeros_32, 2, 64, 32, 4, 4, BYTES, 2)
GEMM(gemm_2_zeros_64, 2, 64, 64, 4, 4, BYTES, TWO)
GEMM(gemm_2_zeros_128, 2, 64, 128, 2, 4, BYTES, TWO)
GEMM(gemm_3_zeros_16, 3, 64, 16, 4, 4, BYTES, 2)
GEMM(gemm_3_zeros_32, 3, 64, 32, 4, 4, BYTES, 2)
GEMM(gemm_3_zeros_64, 3, 64, 64, 4, 4, BYTES, 1)
GEMM(gemm_3_zeros_128, 3, 64, 128, 2, 4, BYTES, 1)
