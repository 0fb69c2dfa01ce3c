// Scores of pages in two steps (HISA, arXiv 2603.28458): blocks of pages by their mean keys, then bounds as select_pages.cu has them of the
// pages in the best blocks alone. The index (kernels_cpu/page_index.py, hierarchy) is completed on the way.
//   keep_blocks  a block's warps have blocks of pages; the last block of a KV head to end writes 0 for the pages of the `blocks` best ones,
//                the first and the last among them, -infinity for others
//   score_kept   bounds in place of zeros
//   grid of both (kv_heads * parts, sequences), block 512 threads; shared Choosing, nothing
#include "page_bounds.cuh"
#include "page_scores.cuh"

#define MOST_DEPTH 256
#define BLOCK 4  // pages

// Rows of one KV head: bounds of pages, unless quantised ones know theirs, and behind those of all pages means of blocks.
struct Rows {
    u16 *bounds, *means;  // bounds null: there are none

    __device__ __forceinline__ Rows(const Selection& a, int s, int head)
    {
        const i64 depth = a.call.head_dim;
        bounds = a.index_row(s, head, 0), means = bounds + a.call.max_pages * (a.index_width - (depth + BLOCK - 1) / BLOCK);
        if (a.index_width < 2 * depth) bounds = nullptr;
    }
};

// By a warp: the mean of the keys of four pages, summed in their order, channel by channel.
__device__ __forceinline__ void make_mean(const Call& call, const int* entries, u16* row)
{
    const int depth = (int)call.head_dim;
    for (int c = threadIdx.x % 32; c < depth; c += 32) {
        float sum = 0;
        int count = 0;
        for (int i = 0; i < BLOCK; i++)
            for (int t = 0; t < PAGE && entries[i] >= 0; t++, count++) sum += key_of(Page(call.pools, entries[i]), depth, c, t);
        row[c] = float_to_half(sum / max(count, 1));
    }
}

SCORING_WITH(keep_blocks, AS_PARAMETER(blocks))
{
    DYNAMIC_SHARED(float4, memory);
    Choosing& choosing = *reinterpret_cast<Choosing*>(memory);
    __shared__ float turned[HEADS * MOST_DEPTH];
    release_next();
    wait_previous();
    const Selection a = MAKE_SELECTION;
    const Call& call = a.call;
    const int s = blockIdx.y, head = blockIdx.x % (int)call.kv_heads, part = blockIdx.x / (int)call.kv_heads, depth = (int)call.head_dim;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = s * (int)call.kv_heads + head;
    if (!a.chooses(s, head)) return;
    const int2 range = a.candidates(s, head, a.total(call.slots(s, head)));
    const int low = range.x / BLOCK, high = (range.y - 1) / BLOCK, middle = high - low - 1, known = *a.indexed_of(s, head);
    const int* table = call.table(s, head);
    const Rows rows(a, s, head);
    float *found = a.scores_of(s, head), *of_blocks = at<float>(a.softmax) + place * call.max_pages;
    int* order = at<int>(a.softmax) + (gridDim.y * call.kv_heads + place) * call.max_pages;
    prepare_queries(call, s, head * call.group(), call.group(), turned);
    for (int b = low + part * WARPS + warp; b <= high; b += (int)parts * WARPS) {
        for (int page = max(BLOCK * b, known); rows.bounds && page < min(BLOCK * (b + 1), range.y); page++)
            if (table[page] >= 0)
                make_row(Page(call.pools, table[page]), depth, call.keys_rotated, rows.bounds + (i64)page * 2 * depth, lane);
        u16* mean = rows.means + (i64)b * depth;
        if (BLOCK * (b + 1) <= range.y && BLOCK * (b + 1) > known) make_mean(call, table + BLOCK * b, mean);
        __syncwarp();
        if (b == low || b == high) continue;
        float best = -infinity();
        for (int h = 0; h < call.group(); h++) {
            float sum = 0;
            for (int c = lane; c < depth; c += 32) sum = fmaf(turned[h * depth + c], half_to_float(mean[c]), sum);
            best = fmaxf(best, warp_sum(sum));
        }
        if (lane == 0) of_blocks[b] = best;
    }
    if (!last_to_arrive(place, (int)parts)) return;
    const int wanted = (int)blocks - 2;  // besides the first and the last
    int unused;
    if (wanted && middle > wanted) top_pages(choosing, of_blocks, low + 1, high, wanted, order, nullptr, 0, unused);
    __syncthreads();
    for (int page = range.x + threadIdx.x; page < range.y; page += SELECT_THREADS) {
        const int b = page / BLOCK, i = b - low - 1;
        const bool stays = middle <= wanted || b == low || b == high || wanted && choosing.words[i / 32] >> i % 32 & 1;
        found[page] = stays && table[page] >= 0 ? 0 : -infinity();
    }
}

SCORING(score_kept)
{
    __shared__ float turned[HEADS * MOST_DEPTH];
    release_next();
    wait_previous();
    const Selection a = MAKE_SELECTION;
    const Call& call = a.call;
    const int s = blockIdx.y, head = blockIdx.x % (int)call.kv_heads, part = blockIdx.x / (int)call.kv_heads, depth = (int)call.head_dim;
    if (!a.chooses(s, head)) return;
    const int2 range = a.candidates(s, head, a.total(call.slots(s, head)));
    const Rows rows(a, s, head);
    const float range_counts = __int_as_float((int)a.reach);
    float* found = a.scores_of(s, head);
    prepare_queries(call, s, head * call.group(), call.group(), turned, false);  // as bounds are
    for (int number = range.x + part * WARPS + threadIdx.x / 32; number < range.y; number += (int)parts * WARPS) {
        if (found[number] < 0) continue;
        const Page page(call.pools, call.table(s, head)[number]);
        const u16* row = rows.bounds ? rows.bounds + (i64)number * 2 * depth : at<u16>(page.place(K_PARAMS));
        const float levels = rows.bounds ? 1 : (float)page.pool[K_LEVELS];
        float best = -infinity();
        for (int h = 0; h < call.group(); h++) {
            float sum = 0;
            for (int c = threadIdx.x % 32; c < depth; c += 32) {
                const float x = turned[h * depth + c], step = levels * half_to_float(row[depth + c]);
                sum = fmaf(x, half_to_float(row[c]), fmaf(0.5f * fmaf(fabsf(x), range_counts, x), step, sum));
            }
            best = fmaxf(best, warp_sum(sum));
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) found[number] = best;
    }
}
