// Zero points that are halves (HQQ).
#include "gemm_nbits.cuh"

GEMM(gemm_2_halves_16, 2, 64, 16, 4, 4, HALVES, 3)
GEMM(gemm_2_halves_32, 2, 64, 32, 4, 4, HALVES, 2)
GEMM(gemm_2_halves_64, 2, 64, 64, 4, 4, HALVES, 1)
GEMM(gemm_2_halves_128, 2, 64, 128, 2, 4, HALVES, 1)
GEMM(gemm_3_halves_16, 3, 64, 16, 4, 4, HALVES, 3)
GEMM(gemm_3_halves_32, 3, 64, 32, 4, 4, HALVES, 2)
GEMM(gemm_3_halves_64, 3, 64, 64, 4, 4, HALVES, 1)
GEMM(gemm_3_halves_128, 3, 64, 128, 2, 4, HALVES, 1)
GEMM(gemm_4_halves_16, 4, 64, 16, 4, 4, HALVES, 3)
GEMM(gemm_4_halves_32, 4, 64, 32, 4, 4, HALVES, 2)
GEMM(gemm_4_halves_64, 4, 64, 64, 4, 4, HALVES, 1)
GEMM(gemm_4_halves_128, 4, 64, 128, 2, 4, HALVES, 1)
GEMM(gemm_8_halves_16, 8, 64, 16, 4, 4, HALVES, 3)
GEMM(gemm_8_halves_32, 8, 64, 32, 4, 4, HALVES, 2)
GEMM(gemm_8_halves_64, 8, 64, 64, 4, 4, HALVES, 1)
GEMM(gemm_8_halves_128, 8, 64, 128, 2, 4, HALVES, 1)
