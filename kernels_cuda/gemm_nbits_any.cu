// Codes of 2 and 3 bits, and zero points that are halves (HQQ).
#include "gemm_nbits.cuh"

GEMM(gemm_2_16, 2, 64, 16, 4, 4, ANY, 3)
GEMM(gemm_2_32, 2, 64, 32, 4, 4, ANY, 2)
GEMM(gemm_2_64, 2, 64, 64, 4, 4, ANY, 1)
GEMM(gemm_2_128, 2, 64, 128, 2, 4, ANY, 1)
GEMM(gemm_3_16, 3, 64, 16, 4, 4, ANY, 3)
GEMM(gemm_3_32, 3, 64, 32, 4, 4, ANY, 2)
GEMM(gemm_3_64, 3, 64, 64, 4, 4, ANY, 1)
GEMM(gemm_3_128, 3, 64, 128, 2, 4, ANY, 1)
GEMM(gemm_4_16, 4, 64, 16, 4, 4, ANY, 3)
GEMM(gemm_4_32, 4, 64, 32, 4, 4, ANY, 2)
GEMM(gemm_4_64, 4, 64, 64, 4, 4, ANY, 1)
GEMM(gemm_4_128, 4, 64, 128, 2, 4, ANY, 1)
GEMM(gemm_8_16, 8, 64, 16, 4, 4, ANY, 3)
GEMM(gemm_8_32, 8, 64, 32, 4, 4, ANY, 2)
GEMM(gemm_8_64, 8, 64, 64, 4, 4, ANY, 1)
GEMM(gemm_8_128, 8, 64, 128, 2, 4, ANY, 1)
