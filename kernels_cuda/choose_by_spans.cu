// Which pages a prompt's queries read, by how far back they lie: the newest alpha + beta * L of L tokens that a block's last query sees, of
// the query head of a KV head that sees farthest (policies/prefill/moa.py and, of no span, streaming.py have the reference).
// Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: a byte a page
#include "prefill_choice.cuh"

// alphas, betas: [layers][num_heads] float32; null: alpha and beta of all heads
KERNEL choose_by_spans(CALL_PARAMETERS CHOICE_PARAMETERS i64 alphas, i64 betas, i64 alpha, i64 beta)
{
    DYNAMIC_SHARED(u8, marks);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    const int end = here.past + here.first + here.rows;
    double span = 0;
    for (int h = 0; h < call.group(); h++) {
        const i64 own = call.layer * call.num_heads + head * call.group() + h;
        const double a = alphas ? at<float>(alphas)[own] : __int_as_float((int)alpha);
        const double b = betas ? at<float>(betas)[own] : __int_as_float((int)beta);
        span = fmax(span, floor(a + b * end));
    }
    const int first = max(0, end - (int)fmin(span, (double)end)) / PAGE;
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p) || p >= first;
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
