// Codes of 2 and 3 bits, and zero points that are halves (HQQ).
#include "gemv_nbits.cuh"

GEMV(gemv_2_32_1, 2, 32, 1, 4, 2, true)
GEMV(gemv_2_32_8, 2, 32, 8, 4, 1, true)
GEMV(gemv_2_16_8, 2, 16, 8, 4, 1, true)
GEMV(gemv_3_32_1, 3, 32, 1, 4, 2, true)
GEMV(gemv_3_32_8, 3, 32, 8, 4, 1, true)
GEMV(gemv_4_32_1, 4, 32, 1, 4, 2, true)
GEMV(gemv_4_32_8, 4, 32, 8, 4, 1, true)
GEMV(gemv_4_16_8, 4, 16, 8, 4, 1, true)
GEMV(gemv_8_32_1, 8, 32, 1, 3, 2, true)
GEMV(gemv_8_32_8, 8, 32, 8, 3, 1, true)
GEMV(gemv_8_16_8, 8, 16, 8, 4, 1, true)
