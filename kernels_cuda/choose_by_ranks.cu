// Which pages a prompt's queries read, by the mean key of each page and the mean of a block's queries: of each query head so many as are a
// part of all pages, the best ones (policies/prefill/dhsa.py has the reference, modes topk and a).
// Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: 5 bytes a page
#include "prefill_means.cuh"

// ends: whether the first page and the newest that is seen count among the best
KERNEL choose_by_ranks(CALL_PARAMETERS CHOICE_PARAMETERS i64 means, i64 density, i64 ends)
{
    DYNAMIC_SHARED(float, memory);
    __shared__ float query[MOST_DEPTH];
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float* weights = memory;
    u8* marks = reinterpret_cast<u8*>(memory + here.pages);
    const int all = (call.slots(s, head) + PAGE - 1) / PAGE, count = max(1, (int)(__int_as_float((int)density) * all));
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p);
    for (int h = 0; h < call.group() && !here.whole; h++) {
        weigh_means(call, here, s, head * call.group() + h, means, query, weights);
        if (ends && threadIdx.x < 2) weights[threadIdx.x ? here.pages - 1 : 0] = infinity();
        __syncthreads();
        pick(room, weights, marks, here.pages, 0, 0, count, count);
    }
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
