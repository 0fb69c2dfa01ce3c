// Prefill attention in which a page that a list leaves out counts as 32 tokens, all of the page's mean key and mean value (the zeroth-order
// term of PISA; the reference is prefill_corrections.tail). attention_prefill.cu has all else.
//   page_means    of full pages of sequences that have lists, in halves: of 32 pages, numbered on over these sequences, and a KV head the
//                 mean keys [D][32], then the mean values [32][D], as in a page.  Grid (pages, kv_heads, sequences), block 128
//   tail_prefill  grid and block of short_prefill: with twice as many rows a warp keeps registers in memory
#include "page_means.cuh"
#include "prefill_block.cuh"

KERNEL page_means(CALL_PARAMETERS i64 chunks, i64 means)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const int s = blockIdx.z, head = blockIdx.y, number = blockIdx.x, depth = (int)call.head_dim;
    if (s >= call.sequences() || call.prefill_lists == 0 || at<i64>(call.prefill_lists)[s] == 0) return;
    if ((number + 1) * PAGE > call.slots(s, head)) return;
    const int entry = call.table(s, head)[number], place = (int)at<i64>(chunks)[s * CHUNK_FIELDS + PAGE_PLACE] + number;
    if (entry < 0) return;
    const Page page(call.pools, entry);
    u16* keys = at<u16>(means + (place / PAGE * call.kv_heads + head) * MEANS_BYTES * depth);
    u16* values = keys + (PAGE + place % PAGE) * depth;
    for (int n = threadIdx.x; n < 2 * depth; n += blockDim.x) {
        const int c = n % depth;
        if (n < depth) keys[c * PAGE + place % PAGE] = float_to_half(mean_key(page, depth, c, PAGE));
        else values[c] = float_to_half(mean_value(page, depth, c, PAGE));
    }
}

#define TAIL_PREFILL(name, depth) \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(CALL_PARAMETERS i64 chunks, i64 means) \
    { \
        prefill<depth, 1, TAIL>(MAKE_CALL, {chunks, 0, 0, means}); \
    }
TAIL_PREFILL(tail_prefill_64, 64)
TAIL_PREFILL(tail_prefill_128, 128)
