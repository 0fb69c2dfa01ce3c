// Decode attention to all pages, or to those that select_pages has chosen.
#include "decode.cuh"

#define DECODE(name, kind, depth, warps) \
    extern "C" __global__ void __launch_bounds__(32 * warps, 2) name(CALL_PARAMETERS i64 stages, i64 memory, i64 blocks) \
    { \
        decode<kind, depth, warps>(MAKE_CALL, (int)stages, {memory, blocks}); \
    }
DECODE(decode_f16_64, F16, 64, 4)
DECODE(decode_f16_128, F16, 128, 4)
DECODE(decode_int4_64, INT4, 64, 8)
DECODE(decode_int4_128, INT4, 128, 8)
DECODE(decode_mixed_64, MIXED, 64, 8)
DECODE(decode_mixed_128, MIXED, 128, 8)
