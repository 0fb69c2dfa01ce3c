// Decode attention to all pages, or to those that select_pages has chosen.
#include "decode.cuh"

#define DECODE(name, kind, depth, warps, blocks, in_cluster) \
    extern "C" __global__ void __launch_bounds__(32 * warps, blocks) name(CALL_PARAMETERS i64 stages, i64 merge) \
    { \
        decode<kind, depth, warps, in_cluster>(MAKE_CALL, (int)stages, (int)merge); \
    }
DECODE(decode_f16_64, F16, 64, 4, 2, false)
DECODE(decode_f16_128, F16, 128, 4, 2, false)
DECODE(decode_int4_64, INT4, 64, 8, 2, false)
DECODE(decode_int4_128, INT4, 128, 8, 2, false)
DECODE(decode_mixed_64, MIXED, 64, 8, 2, false)
DECODE(decode_mixed_128, MIXED, 128, 8, 2, false)
#ifdef CLUSTERS  // one block a processor: a cluster has as many processors as it has blocks
DECODE(decode_cluster_f16_64, F16, 64, 8, 1, true)
DECODE(decode_cluster_f16_128, F16, 128, 8, 1, true)
DECODE(decode_cluster_int4_64, INT4, 64, 16, 1, true)
DECODE(decode_cluster_int4_128, INT4, 128, 16, 1, true)
#endif
