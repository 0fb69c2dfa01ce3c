// Which pages a prompt's queries read, by the true weights of some of them (sampled_weights.cu): pages of keys, and bands of 32 distances,
// that cover a part of these (SampleAttention, arXiv 2406.15486), or, of heads whose weights the means of queries and keys tell, pages that
// cover a part of what those estimate (FlexPrefill, 2502.20766). The references are policies/prefill/sample_attention.py, flex_prefill.py.
//   estimate_pages   estimates [num_heads][query blocks][max_pages] float32: of each sequence [its query blocks][its pages], TAKEN where
//                    nothing is seen; newest [num_heads][pages of all sequences], of the sampled queries; maps, zeros.
//                    Grid (query blocks + 1, kv_heads, sequences), block CHOICE_THREADS
//   pick_samples     flags [kv_heads][pages of all sequences] words: bit DOWN, page p is read by all; bit ACROSS, what lies a band p back
//                    is; and maps [kv_heads][query blocks][max_pages / 32] words, pages by estimate.
//                    Grid (2, or with estimates 3, num_heads, sequences), block CHOICE_THREADS
//   choose_by_samples  the lists. Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: a byte a page
#include "prefill_means.cuh"
#include "sampled_queries.cuh"

#define DOWN 1u
#define ACROSS 2u

KERNEL estimate_pages(CALL_PARAMETERS CHOICE_PARAMETERS SAMPLE_PARAMETERS i64 unused)
{
    __shared__ float mean[HEADS][MOST_DEPTH];
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Samples samples = MAKE_SAMPLES;
    const int s = blockIdx.z, head = blockIdx.y, first_head = head * call.group();
    const bool last = blockIdx.x == gridDim.x - 1;  // the sampled queries
    const QueryBlock start(call, choice, s, head, 0), here(call, choice, s, head, last ? 0 : blockIdx.x);
    if (!here.there) return;
    const int n = call.rows(s), all = (call.slots(s, head) + PAGE - 1) / PAGE, rows = last ? min((int)samples.sampled, n) : here.rows;
    const int first = call.first_row(s) + (last ? n - rows : here.first), pages = last ? all : here.pages;
    const i64 stride = last ? samples.page_places : samples.query_places * call.max_pages;
    float* own = last ? at<float>(samples.newest) + samples.page(start, first_head)
                      : samples.map(call, start, first_head) + here.first / QUERY_BLOCK * all;
    if (!last)
        for (int w = threadIdx.x; w < (call.max_pages + 31) / 32; w += CHOICE_THREADS) samples.words(call, head, here.place)[w] = 0;
    score_means(call, here, head, first, rows, pages, samples.means, mean, own, stride);
    for (int h = 0; h < call.group(); h++, own += stride) {
        scores_to_weights(room, own, pages);
        for (int p = pages + threadIdx.x; p < all; p += CHOICE_THREADS) own[p] = TAKEN;
    }
}

// What one place adds to the Jensen-Shannon divergence of two distributions, in nats.
__device__ __forceinline__ float divergence(float a, float b)
{
    const float middle = (a + b) / 2;
    return ((a > 0 ? a * logf(a / middle) : 0) + (b > 0 ? b * logf(b / middle) : 0)) / 2;
}

// What pick() does of as many weights as lie in global memory, of 1 at most, where nothing but the part decides: three bits of the limit at
// a time, for a pass over the weights takes longest.
template <typename Mark>
__device__ __forceinline__ void pick_of_many(Totals& room, const float* weights, const Mark& mark, int count, float target)
{
    u32 bits = 0;
    for (int shift = 27; shift >= 0; shift -= 3) {
        float sums[8] = {};
#pragma unroll 4
        for (int n = threadIdx.x; n < count; n += CHOICE_THREADS) {
            const float x = weights[n];
#pragma unroll
            for (int i = 1; i < 8; i++) sums[i] += x >= __int_as_float((int)(bits | i << shift)) ? x : 0;
        }
        u32 step = 0;
#pragma unroll
        for (int i = 1; i < 8; i += 2) {
            const float2 found = block_sums(room, sums[i], i < 7 ? sums[i + 1] : 0);
            step += (found.x >= target) + (i < 7 && found.y >= target);
        }
        bits |= step << shift;
    }
    mark_heaviest(room, weights, mark, count, __int_as_float((int)bits), 0, target, 0, count);
}

KERNEL pick_samples(CALL_PARAMETERS CHOICE_PARAMETERS SAMPLE_PARAMETERS i64 unused)
{
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Samples samples = MAKE_SAMPLES;
    const int s = blockIdx.z, head = blockIdx.y, kv_head = head / call.group(), what = blockIdx.x;
    const QueryBlock start(call, choice, s, kv_head, 0);
    if (!start.there) return;
    const int pages = (call.slots(s, kv_head) + PAGE - 1) / PAGE, n = call.rows(s);
    const float *by_page = at<float>(samples.page_sums) + samples.page(start, head), most = __int_as_float((int)samples.below);
    bool trusted = false;
    if (most > 0) {
        const float *estimate = at<float>(samples.newest) + samples.page(start, head), part = 1.0f / min((int)samples.sampled, n);
        float apart = 0;
        for (int p = threadIdx.x; p < pages; p += CHOICE_THREADS) apart += divergence(estimate[p], by_page[p] * part);
        trusted = block_sums(room, apart, 0).x < most;
    }
    if (what == 2 && !trusted) return;
    const float* weights = what == 0 ? by_page : what == 1 ? at<float>(samples.band_sums) + samples.page(start, head)
                                                           : samples.map(call, start, head);
    const int count = what == 2 ? start.blocks * pages : pages;
    float all = 0;
    for (int p = threadIdx.x; p < count; p += CHOICE_THREADS) all += fmaxf(weights[p], 0);
    all = block_sums(room, all, 0).x;
    const float part = __int_as_float((int)(what == 1 ? samples.part_across : samples.part_down));
    const float target = what < 2 && trusted ? 0 : part < 1 ? part * all : infinity();
    u32* own = at<u32>(samples.flags) + samples.page(start, kv_head);
    const auto mark = [&](int i) {
        if (what < 2) atomicOr(own + i, what == 0 ? DOWN : ACROSS);
        else atomicOr(samples.words(call, kv_head, start.place + i / pages) + i % pages / 32, 1u << i % pages % 32);
    };
    if (what < 2) pick(room, weights, mark, count, 0, target, (int)samples.fewest, count);
    else pick_of_many(room, weights, mark, count, target);
}

KERNEL choose_by_samples(CALL_PARAMETERS CHOICE_PARAMETERS SAMPLE_PARAMETERS i64 unused)
{
    DYNAMIC_SHARED(u8, marks);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Samples samples = MAKE_SAMPLES;
    const int s = blockIdx.z, head = blockIdx.y;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    const u32* flag = at<u32>(samples.flags) + samples.page(here, head);
    const u32* map = samples.estimates ? samples.words(call, head, here.place) : nullptr;
    const int first = here.past + here.first, end = first + here.rows;  // of the block's queries
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) {
        bool read = here.kept(choice, p) || flag[p] & DOWN || (map && map[p / 32] >> p % 32 & 1);
        const int near = max(0, first - (p + 1) * PAGE + 1) / PAGE;
        for (int band = near; band * PAGE < end - p * PAGE; band++) read |= (flag[band] & ACROSS) != 0;
        marks[p] = read;
    }
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
