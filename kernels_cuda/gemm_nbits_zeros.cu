// Codes of 4 and 8 bits, with zero points that are bytes.
#include "gemm_nbits.cuh"

GEMM(gemm_4_zeros_16, 4, 64, 16, 4, 4, BYTES, 3)
GEMM(gemm_4_zeros_32, 4, 64, 32, 4, 4, BYTES, 2)
GEMM(gemm_4_zeros_64, 4, 64, 64, 4, 4, BYTES, TWO)
GEMM(gemm_4_zeros_128, 4, 64, 128, 2, 4, BYTES, TWO)
GEMM(gemm_8_zeros_16, 8, 64, 16, 4, 4, BYTES, 3)
GEMM(gemm_8_zeros_32, 8, 64, 32, 4, 4, BYTES, 2)
GEMM(gemm_8_zeros_64, 8, 64, 64, 4, 4, BYTES, TWO)
GEMM(gemm_8_zeros_128, 8, 64, 128, 2, 4, BYTES, TWO)
