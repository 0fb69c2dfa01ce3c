// Codes of 2 and 3 bits, and zero points that are halves (HQQ).
#include "gemm_nbits.cuh"

GEMM(gemm_2, 2, 64, 128, 4, ANY, 1)
GEMM(gemm_3, 3, 64, 128, 4, ANY, 1)
GEMM(gemm_4, 4, 64, 128, 4, ANY, 1)
GEMM(gemm_8, 8, 64, 128, 4, ANY, 1)
