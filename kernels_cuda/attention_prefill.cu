// Prefill attention on tensor cores: a block is up to 128 rows of queries (tokens x heads of a KV head's group, so that keys and values
// are shared) against what they see, 64 cached tokens at a time, the next keys fetched while values are read and the other way round
// (after FlashAttention-2, arXiv 2307.08691). Pages of codes are expanded to halves on the way.
//   grid   (tiles of rows, kv_heads, sequences), the last rows first: they see the most
//   block  128 threads: a warp has 32 rows, as what it reads of shared memory then serves twice as many; 16 (short_prefill) where there
//          would be too few blocks for all processors
// And what is made good of what lists leave out (Delta Attention, arXiv 2505.11254; the reference is prefill_corrections.delta):
//   first_rows  of every block of queries of a sequence with lists the first one against everything, in ranges of what is seen: partial
//               results [ranges][query blocks of all sequences][num_heads][D + 4], weighted values, log2 of the reference, sum of weights
//   grid        (tiles of 64 rows * ranges, kv_heads, sequences), block 128
//   add_shifts  what that changes is added to all queries of the block. Grid (query blocks, num_heads, sequences), block D
#include "prefill_block.cuh"

#define PREFILL(name, depth, m) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(CALL_PARAMETERS i64 unused) { prefill<depth, m, PLAIN>(MAKE_CALL, {}); }
PREFILL(prefill_64, 64, 2)
PREFILL(prefill_128, 128, 2)
PREFILL(short_prefill_64, 64, 1)
PREFILL(short_prefill_128, 128, 1)

#define FIRST_ROWS(name, depth) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(CALL_PARAMETERS i64 chunks, i64 ranges, i64 places) \
    { \
        prefill<depth, 1, FIRSTS>(MAKE_CALL, {chunks, ranges, places}); \
    }
FIRST_ROWS(first_rows_64, 64)
FIRST_ROWS(first_rows_128, 128)

KERNEL add_shifts(CALL_PARAMETERS i64 chunks, i64 ranges, i64 places)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Besides besides = {chunks, ranges, places};
    const int s = blockIdx.z, head = blockIdx.y, begin = blockIdx.x * QUERY_BLOCK, c = threadIdx.x, depth = (int)call.head_dim;
    if (s >= call.sequences() || call.prefill_lists == 0 || at<i64>(call.prefill_lists)[s] == 0 || begin >= call.rows(s)) return;
    float top = LOWEST, sum = 0, x = 0;
    for (int range = 0; range < ranges; range++) {
        const float* partial = besides.of(call, s, blockIdx.x, head, range);
        const float best = fmaxf(top, partial[depth]), before = exp2f(top - best), now = exp2f(partial[depth] - best);
        x = x * before + partial[c] * now, sum = sum * before + partial[depth + 1] * now, top = best;
    }
    float* to = at<float>(call.out) + (call.first_row(s) + begin) * call.out_stride + head * depth + c;
    const float change = x / sum - *to;
    for (int r = 0; r < min(QUERY_BLOCK, call.rows(s) - begin); r++) to[r * call.out_stride] += change;
}
