// Codes of 4 and 8 bits, whose zero points are bytes, or none: what most models have.
#include "gemv_nbits.cuh"

GEMV(gemv_4_32_1, 4, 32, 1, 4, 2, false)
GEMV(gemv_4_32_4, 4, 32, 4, 4, 2, false)
GEMV(gemv_4_32_8, 4, 32, 8, 4, 1, false)
GEMV(gemv_8_32_1, 8, 32, 1, 3, 2, false)
GEMV(gemv_8_32_8, 8, 32, 8, 3, 1, false)
GEMV(gemv_4_16_8, 4, 16, 8, 4, 1, false)
GEMV(gemv_8_16_8, 8, 16, 8, 4, 1, false)
