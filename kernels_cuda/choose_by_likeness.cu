// Which pages a prompt's queries read, by the mean key of each page and the mean of a block's queries, where tokens are alike, so that a
// mean speaks for them (SpargeAttn, arXiv 2502.18137; the reference is policies/prefill/sparge_attn.py).
//   center_keys         centers [places of blocks][kv_heads][head_dim] float32, at a sequence's first block: the mean of all keys.
//                       Grid (head_dim / 32, kv_heads, sequences), block 256
//   page_likeness       likeness [kv_heads][pages of all sequences] float32: the mean cosine of all pairs of a page's keys, less their
//                       center. Grid (pages, kv_heads, sequences), block 128
//   choose_by_likeness  the lists. Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: 5 bytes a page
#include "page_values.cuh"
#include "prefill_means.cuh"

#define ALIKE_ARGS(X) X(means) X(centers) X(likeness) X(page_places)
#define ALIKE_PARAMETERS ALIKE_ARGS(AS_PARAMETER)

KERNEL center_keys(CALL_PARAMETERS CHOICE_PARAMETERS ALIKE_PARAMETERS i64 unused)
{
    __shared__ float room[8][32];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim, warp = threadIdx.x / 32;
    const int c = blockIdx.x * 32 + threadIdx.x % 32;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int slots = call.slots(s, head), pages = (slots + PAGE - 1) / PAGE;
    float sum = 0;
#pragma unroll 4
    for (int p = warp; p < pages && c < depth; p += 8)
        sum += at<float>(means)[((start.page_place + p) * call.kv_heads + head) * depth + c] * min(PAGE, slots - p * PAGE);
    room[warp][threadIdx.x % 32] = sum;
    __syncthreads();
    if (warp || c >= depth) return;
    for (int w = 1; w < 8; w++) sum += room[w][threadIdx.x];
    at<float>(centers)[(start.place * call.kv_heads + head) * depth + c] = sum / slots;
}

KERNEL page_likeness(CALL_PARAMETERS CHOICE_PARAMETERS ALIKE_PARAMETERS i64 unused)
{
    __shared__ float room[4][32];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y, number = blockIdx.x, depth = (int)call.head_dim, warp = threadIdx.x / 32;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int tokens = min(PAGE, call.slots(s, head) - number * PAGE), t = threadIdx.x % 32;
    if (tokens <= 0) return;
    const int entry = call.table(s, head)[number];
    const float* center = at<float>(centers) + (start.place * call.kv_heads + head) * depth;
    const Page page(call.pools, max(entry, 0));
    const auto key = [&](int c) { return (entry >= 0 && t < tokens ? key_at(page, depth, c, t) : 0) - center[c]; };
    float square = 0;
#pragma unroll 4
    for (int c = warp; c < depth; c += 4) {
        const float x = key(c);
        square += x * x;
    }
    room[warp][t] = square;
    __syncthreads();
    square = room[0][t] + room[1][t] + room[2][t] + room[3][t];
    __syncthreads();
    const float inverse = t < tokens && square > 0 ? rsqrtf(square) : 0;
    float found = 0;
#pragma unroll 4
    for (int c = warp; c < depth; c += 4) {
        const float sum = warp_sum(key(c) * inverse) / tokens;
        found += sum * sum;
    }
    if (t == 0) room[warp][0] = found;
    __syncthreads();
    if (threadIdx.x) return;
    at<float>(likeness)[head * page_places + start.page_place + number] = fminf(room[0][0] + room[1][0] + room[2][0] + room[3][0], 1.0f);
}

// By a block of CHOICE_THREADS: mean [head_dim] of a block's queries of one head, turned as keys are, in powers of 2; -> the mean cosine of
// all their pairs, 1 where nobody asks. inverse: room for QUERY_BLOCK.
__device__ __forceinline__ float mean_and_likeness(const Call& call, const QueryBlock& here, Totals& room, int s, int head, bool asked,
                                                   float* mean, float* inverse)
{
    const int depth = (int)call.head_dim, first = call.first_row(s) + here.first, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* q = at<float>(call.q) + first * call.q_stride + head * depth;
    const i64* positions = at<i64>(call.positions) + first;
    __syncthreads();
    for (int r = warp; r < here.rows && asked; r += CHOICE_WARPS) {
        float square = 0;
        for (int c = lane; c < depth; c += 32) {
            const float x = rotated(call, q + r * call.q_stride, positions[r], c);
            square += x * x;
        }
        square = warp_sum(square);
        if (lane == 0) inverse[r] = square > 0 ? rsqrtf(square) : 0;
    }
    __syncthreads();
    float found = 0;
    for (int c = threadIdx.x; c < depth; c += CHOICE_THREADS) {
        float sum = 0, direction = 0;
#pragma unroll 4
        for (int r = 0; r < here.rows; r++) {
            const float x = rotated(call, q + r * call.q_stride, positions[r], c);
            sum += x, direction += asked ? x * inverse[r] : 0;
        }
        mean[c] = sum / here.rows * call.scale() * LOG2E, direction /= here.rows, found += direction * direction;
    }
    if (call.keys_rotated) hadamard(mean, 1, depth, MOST_DEPTH);
    found = block_sums(room, found, 0).x;
    return asked ? fminf(found, 1.0f) : 1.0f;
}

// A part of the pages' softmax is covered; similarity and part are of all heads, or of each, in `heads` [layers][num_heads][2] float32.
// fraction: of the pages that a block sees, bits of a double, so that as many are chosen as Python's floats say; below 0, and where heads
// have their own, the part counts. likeness 0: all are alike.
KERNEL choose_by_likeness(CALL_PARAMETERS CHOICE_PARAMETERS ALIKE_PARAMETERS i64 heads, i64 similarity, i64 part, i64 fraction)
{
    DYNAMIC_SHARED(float, memory);
    __shared__ float mean[MOST_DEPTH], inverse[QUERY_BLOCK];
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float* weights = memory;
    u8* marks = reinterpret_cast<u8*>(memory + here.pages);
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p);
    for (int h = head * call.group(); h < (head + 1) * call.group() && !here.whole; h++) {
        const float* own = heads ? at<float>(heads) + 2 * (call.layer * call.num_heads + h) : nullptr;
        const float least = own ? own[0] : __int_as_float((int)similarity), covered = own ? own[1] : __int_as_float((int)part);
        const bool alike = mean_and_likeness(call, here, room, s, h, likeness != 0, mean, inverse) > least;
        const float* pages_alike = likeness ? at<float>(likeness) + head * page_places + here.page_place : nullptr;
        float top = LOWEST, total = 0;
        for (int p = warp; p < here.pages; p += CHOICE_WARPS) {
            const float* x = at<float>(means) + ((here.page_place + p) * call.kv_heads + head) * depth;
            float score = 0;
            for (int c = lane; c < depth; c += 32) score = fmaf(mean[c], x[c], score);
            score = warp_sum(score);
            const bool trusted = !pages_alike || pages_alike[p] > least;
            if (trusted) top = fmaxf(top, score);
            if (lane == 0) weights[p] = trusted ? score : infinity();
            if (lane == 0 && !(trusted && alike)) marks[p] = 1;
        }
        top = block_max(room, top);
        for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) {
            weights[p] = weights[p] < infinity() ? exp2f(weights[p] - top) : TAKEN;
            total += fmaxf(weights[p], 0);
        }
        total = block_sums(room, total, 0).x;
        const double some = own ? -1 : __longlong_as_double(fraction);
        if (some >= 0) pick(room, weights, marks, here.pages, 0, 0, (int)ceil(some * here.pages), (int)ceil(some * here.pages));
        else pick(room, weights, marks, here.pages, 0, covered < 1 ? covered * total : infinity(), 0, here.pages);
    }
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
