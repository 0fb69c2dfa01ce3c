// Which keys a prompt's queries read: keys are sorted inside segments by the weight that the last queries give them, so that those that
// matter share a block of 32, and these blocks are chosen by their mean keys (PBS-Attn, arXiv 2510.21270; the reference is
// policies/prefill/pbs_attn.py). Nothing is moved. Weights of keys are those of choose_by_lines.
//   sort_keys     order, blocks [kv_heads][slots of all sequences] int32: which key stands at a place of its segment, and which sorted
//                 block a key belongs to. Grid (slots / 256, kv_heads, sequences), block 256
//   sorted_means  means [pages of all sequences][kv_heads][head_dim] float32, of sorted blocks. Grid (segments, kv_heads, sequences),
//                 block 128
//   choose_by_sorting  the lists. A block chooses for each query head of a KV head and reads what all of them do; scores [num_heads][query
//                 blocks of all sequences][max_pages] float32 are its scratch. Grid (query blocks, kv_heads, sequences), block
//                 CHOICE_THREADS, shared: 5 bytes a page
#include "page_values.cuh"
#include "prefill_means.cuh"

#define SORTING_ARGS(X) X(by_key) X(order) X(blocks) X(means) X(scores) X(places) X(page_places) X(segment) X(tau)
#define SORTING_PARAMETERS SORTING_ARGS(AS_PARAMETER) i64 unused
#define MAKE_SORTING Sorting{SORTING_ARGS(AS_VALUE)}
#define SORT_THREADS 256
#define MEAN_DEPTH 128  // channels of a head at most
#define MEANS 32        // of as many sorted blocks at a time

struct Sorting {
    SORTING_ARGS(AS_FIELD)

    // Of a head, the first of a sequence's slots.
    __device__ __forceinline__ i64 slot(const QueryBlock& here, i64 head) const { return (head * page_places + here.page_place) * PAGE; }
};

KERNEL sort_keys(CALL_PARAMETERS CHOICE_PARAMETERS SORTING_PARAMETERS)
{
    __shared__ float weights[SORT_THREADS];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Sorting sorting = MAKE_SORTING;
    const int s = blockIdx.z, head = blockIdx.y, size = (int)segment, first = blockIdx.x * SORT_THREADS, key = first + threadIdx.x;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int whole = call.slots(s, head) / size * size;
    if (first >= whole) return;
    const float* sums = at<float>(by_key) + sorting.slot(start, head * call.group());
    const auto weight = [&](int n) {
        float sum = 0;
        for (int h = 0; h < call.group(); h++) sum += sums[h * page_places * PAGE + n];
        return sum;
    };
    const float own = key < whole ? weight(key) : 0;
    const int begin = key / size * size, last = min(first + SORT_THREADS, whole) - 1;
    int rank = 0;
    for (int tile = first / size * size; tile < last / size * size + size; tile += SORT_THREADS) {
        __syncthreads();
        if (tile + threadIdx.x < whole) weights[threadIdx.x] = weight(tile + threadIdx.x);
        __syncthreads();
        for (int n = max(begin, tile); n < min(begin + size, tile + SORT_THREADS) && key < whole; n++) {
            const float other = weights[n - tile];
            rank += other > own || (other == own && n < key);
        }
    }
    if (key >= whole) return;
    at<int>(order)[sorting.slot(start, head) + begin + rank] = key;
    at<int>(blocks)[sorting.slot(start, head) + key] = (begin + rank) / PAGE;
}

KERNEL sorted_means(CALL_PARAMETERS CHOICE_PARAMETERS SORTING_PARAMETERS)
{
    __shared__ float sums[MEANS][MEAN_DEPTH];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Sorting sorting = MAKE_SORTING;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim, c = threadIdx.x, count = (int)segment / PAGE;
    const int first = blockIdx.x * count;  // page, and sorted block
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there || (first + count) * PAGE > call.slots(s, head) || c >= depth) return;
    const int *table = call.table(s, head), *own = at<int>(blocks) + sorting.slot(start, head);
    for (int from = first; from < first + count; from += MEANS) {
        for (int b = 0; b < MEANS; b++) sums[b][c] = 0;
        for (int p = first; p < first + count; p++) {
            if (table[p] < 0) continue;
            each_token(Page(call.pools, table[p]), depth, c, [&](int t, float x) {
                const int to = own[p * PAGE + t] - from;
                if (to >= 0 && to < MEANS) sums[to][c] += x;
            });
        }
        for (int b = 0; b < min(MEANS, first + count - from); b++)
            at<float>(means)[((start.page_place + from + b) * call.kv_heads + head) * depth + c] = sums[b][c] / PAGE;
    }
}

KERNEL choose_by_sorting(CALL_PARAMETERS CHOICE_PARAMETERS SORTING_PARAMETERS)
{
    DYNAMIC_SHARED(float, memory);
    __shared__ float queries[HEADS][MOST_DEPTH];
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Sorting sorting = MAKE_SORTING;
    const int s = blockIdx.z, head = blockIdx.y, group = call.group(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float* weights = memory;
    u32* words = reinterpret_cast<u32*>(memory);  // when weights are no longer needed
    u8* marks = reinterpret_cast<u8*>(memory + here.pages);
    const int count = (here.past + here.first) / (int)segment * (int)segment / PAGE;  // pages of the segments before the block's own
    for (int p = threadIdx.x; p < count; p += CHOICE_THREADS) marks[p] = 0;
    if (count && !here.whole) {
        const i64 stride = places * call.max_pages;  // of heads
        float* own = at<float>(scores) + (head * group * places + here.place) * call.max_pages;
        score_means(call, here, head, call.first_row(s) + here.first, here.rows, count, means, queries, own, stride);
        const float part = __int_as_float((int)tau);
        for (int h = 0; h < group; h++) {
            for (int p = threadIdx.x; p < count; p += CHOICE_THREADS) weights[p] = own[h * stride + p];
            __syncthreads();
            scores_to_weights(room, weights, count);
            __syncthreads();
            pick(room, weights, marks, count, 0, part < 1 ? part : infinity(), 0, count);
        }
    }
    __syncthreads();
    for (int p = warp; p < here.pages; p += CHOICE_WARPS) {
        const bool all = p >= count || here.kept(choice, p);
        const u32 word = __ballot_sync(FULL_WARP, all || marks[at<int>(blocks)[sorting.slot(here, head) + p * PAGE + lane]]);
        if (lane == 0) words[p] = word;
    }
    __syncthreads();
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = words[p] == FULL_WARP;
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks, words);
}
