// Which pages a prompt's queries read, by the mean key of each page and the mean of a block's queries (policies/prefill/auto.py).
//   mean_keys        means [pages of all sequences][kv_heads][head_dim] float32.  Grid (pages, kv_heads, sequences), block 128
//   choose_by_means  the lists. A block chooses for the query heads of a KV head together, by the mean of their softmax over pages; scores
//                    [num_heads][query blocks of all sequences][max_pages] float32 are its scratch.
//                    Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: 5 bytes a page
#include "page_values.cuh"
#include "prefill_means.cuh"

KERNEL mean_keys(CALL_PARAMETERS CHOICE_PARAMETERS i64 means)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y, number = blockIdx.x, depth = (int)call.head_dim;
    const QueryBlock here(call, choice, s, head, 0);
    if (!here.there) return;
    const int tokens = min(PAGE, call.slots(s, head) - number * PAGE);
    if (tokens <= 0) return;
    const int entry = call.table(s, head)[number];
    float* to = at<float>(means) + ((here.page_place + number) * call.kv_heads + head) * depth;
    for (int c = threadIdx.x; c < depth; c += blockDim.x) {
        float sum = 0;
        if (entry >= 0) each_token(Page(call.pools, entry), depth, c, [&](int t, float x) { sum += t < tokens ? x : 0; });
        to[c] = sum / tokens;
    }
}

// fraction: bits of a double, so that a limit is what Python's floats say
KERNEL choose_by_means(CALL_PARAMETERS CHOICE_PARAMETERS i64 means, i64 scores, i64 places, i64 part, i64 least, i64 budget, i64 fraction)
{
    DYNAMIC_SHARED(float, memory);
    __shared__ float queries[HEADS][MOST_DEPTH];
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y, group = call.group();
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float* weights = memory;
    u8* marks = reinterpret_cast<u8*>(memory + here.pages);

    const i64 stride = places * call.max_pages;  // of heads
    float* own = at<float>(scores) + (head * group * places + here.place) * call.max_pages;
    score_means(call, here, head, call.first_row(s) + here.first, here.rows, here.pages, means, queries, own, stride);
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) weights[p] = 0;
    __syncthreads();
    for (int h = 0; h < group; h++) {
        const float* row = own + h * stride;
        float top = LOWEST, total = 0;
        for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) top = fmaxf(top, row[p]);
        top = block_max(room, top);
        for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) total += exp2f(row[p] - top);
        const float factor = 1 / (block_sums(room, total, 0).x * group);
        for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) weights[p] += exp2f(row[p] - top) * factor;
    }
    float before = 0, kept = 0;
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) {
        marks[p] = here.kept(choice, p);
        if (marks[p]) before += weights[p], kept++, weights[p] = TAKEN;
    }
    const float2 known = block_sums(room, before, kept);
    const float wanted = __int_as_float((int)part);
    const int most = max((int)ceil(__longlong_as_double(fraction) * here.pages), (int)budget) - (int)known.y;
    pick(room, weights, marks, here.pages, known.x, wanted < 1 ? wanted : infinity(), (int)least, most);
    write_list(call, choice, here, room, s, head, marks);
}
