// Block-quantised weights in panels of 16 outputs, as they are stored (see the reference of matmul_nbits); matmul_nbits.py's WEIGHTS.
#pragma once
#include "common.cuh"

struct Weights {
    const u8* codes;
    const u16* scales;
    const u8* zero_points;           // null: the default everywhere
    int units, block_shift, panels;  // units (of 32 K, or of 16 where blocks are) of a panel; log2 of the units in a block
};
