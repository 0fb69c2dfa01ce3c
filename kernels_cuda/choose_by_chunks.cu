// Which keys a prompt's queries read: chunks of keys (cut_keys.cu) by the product of their mean with the mean of a block's queries, of all
// heads that hold as many tokens, times the root of their length, until a budget of keys is full (DHSA, arXiv 2510.24606; the reference is
// policies/prefill/dhsa_chunks.py).
//   chunk_keys    keys [kv_heads][PAGE_CHUNKS each page of all sequences][head_dim] float32: sums over a chunk's keys over the root of
//                 their number. Grid (chunks, kv_heads, sequences), block 128
//   sum_queries   queries [query blocks of all sequences][kv_heads][head_dim] float32. Grid (query blocks, kv_heads, sequences), block 128
//   choose_by_chunks  the lists; scores [query blocks of all sequences][kv_heads][PAGE_CHUNKS * max_pages] are its scratch.
//                 Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: 5 bytes a page
#include "key_chunks.cuh"
#include "page_values.cuh"
#include "prefill_means.cuh"

KERNEL chunk_keys(CALL_PARAMETERS CHOICE_PARAMETERS CHUNK_PARAMETERS)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Chunks cut = MAKE_CHUNKS;
    const int s = blockIdx.z, head = blockIdx.y, number = blockIdx.x, depth = (int)call.head_dim;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const Together heads(call, s, head);
    if (head != heads.first || number >= *cut.count(start, head)) return;
    const int* begins = cut.begins(start, head);
    const int begin = begins[number], end = number + 1 < *cut.count(start, head) ? begins[number + 1] : call.slots(s, head);
    float* to = at<float>(keys) + (cut.page(start, head) * PAGE_CHUNKS + number) * depth;
    for (int c = threadIdx.x; c < depth; c += blockDim.x) {
        float sum = 0;
        for (int h = head; h < head + heads.count; h++)
            for (int p = begin / PAGE; p * PAGE < end; p++) {
                const int entry = call.table(s, h)[p], low = max(begin - p * PAGE, 0), high = min(end - p * PAGE, PAGE);
                if (high - low == PAGE)
                    sum += at<float>(means)[((start.page_place + p) * call.kv_heads + h) * depth + c] * PAGE;
                else if (entry >= 0)
                    each_token(Page(call.pools, entry), depth, c, [&](int t, float x) { sum += t >= low && t < high ? x : 0; });
            }
        to[c] = sum / heads.count * rsqrtf((float)(end - begin));
    }
}

KERNEL sum_queries(CALL_PARAMETERS CHOICE_PARAMETERS CHUNK_PARAMETERS)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim, group = call.group();
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    const int first = call.first_row(s) + here.first;
    for (int c = threadIdx.x; c < depth; c += blockDim.x) {
        float sum = 0;
        for (int h = head * group; h < (head + 1) * group; h++) {
            const float* x = at<float>(call.q) + first * call.q_stride + h * depth;
#pragma unroll 4
            for (int r = 0; r < here.rows; r++) sum += rotated(call, x + r * call.q_stride, at<i64>(call.positions)[first + r], c);
        }
        at<float>(queries)[(here.place * call.kv_heads + head) * depth + c] = sum;
    }
}

KERNEL choose_by_chunks(CALL_PARAMETERS CHOICE_PARAMETERS CHUNK_PARAMETERS)
{
    DYNAMIC_SHARED(u32, words);
    __shared__ float query[MOST_DEPTH];
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Chunks cut = MAKE_CHUNKS;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    u8* marks = reinterpret_cast<u8*>(words + here.pages);
    const Together heads(call, s, head);
    const int count = *cut.count(here, heads.first), slots = call.slots(s, head), end = here.past + here.first + here.rows;
    const int* begins = cut.begins(here, heads.first);
    for (int c = threadIdx.x; c < depth; c += CHOICE_THREADS) {
        float sum = 0;
        for (int h = heads.first; h < heads.first + heads.count; h++)
            sum += at<float>(queries)[(here.place * call.kv_heads + h) * depth + c];
        query[c] = sum / (here.rows * call.group() * heads.count);
    }
    if (call.keys_rotated) hadamard(query, 1, depth, MOST_DEPTH);
    __syncthreads();
    float* weight = at<float>(scores) + (here.place * call.kv_heads + head) * call.max_pages * PAGE_CHUNKS;
    for (int j = warp; j < count && !here.whole; j += CHOICE_WARPS) {
        const float* x = at<float>(keys) + (cut.page(here, heads.first) * PAGE_CHUNKS + j) * depth;
        float score = 0;
        for (int c = lane; c < depth; c += 32) score = fmaf(query[c], x[c], score);
        score = warp_sum(score);
        if (lane == 0) weight[j] = ordered(score);
    }
    __syncthreads();
    // Keys that are free to be chosen: those of no page that is read anyhow.
    const int low = min((int)choice.sink, here.near) * PAGE, high = here.near * PAGE, left = (int)budget - (end - (high - low));
    const auto size = [&](int j) { return max(0, min(j + 1 < count ? begins[j + 1] : slots, high) - max(begins[j], low)); };
    // The limit that divides chunks which are read from others, bit by bit as pick() has it, by how many keys are above it.
    u32 bits = 0;
    for (int bit = 30; bit >= 0 && !here.whole; bit--) {
        const float limit = __int_as_float((int)(bits | 1u << bit));
        float sum = 0;
        for (int j = threadIdx.x; j < count; j += CHOICE_THREADS) sum += weight[j] >= limit ? size(j) : 0;
        if (block_sums(room, sum, 0).x >= left) bits |= 1u << bit;
    }
    const float limit = __int_as_float((int)bits);
    float above = 0;
    for (int j = threadIdx.x; j < count && !here.whole; j += CHOICE_THREADS) above += weight[j] > limit ? size(j) : 0;
    int rest = left - (int)block_sums(room, above, 0).x;  // for chunks at the limit, the earlier first
    // Of each chunk, how many of its free keys are read.
    for (int from = 0; from < count && !here.whole; from += CHOICE_THREADS) {
        const int j = from + threadIdx.x, own = j < count ? size(j) : 0;
        const bool equal = j < count && weight[j] == limit;
        int all;
        const int before = block_prefix(room, equal ? own : 0, all);
        if (j < count) weight[j] = left <= 0 ? 0 : equal ? max(0, min(rest - before, own)) : weight[j] > limit ? own : 0;
        rest -= all;
    }
    __syncthreads();
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) {
        words[p] = 0;
        if (here.kept(choice, p)) words[p] = FULL_WARP;
        if (words[p]) continue;
        int j = 0, behind = count;  // the chunk that the page begins in
        while (behind - j > 1) {
            const int middle = (j + behind) / 2;
            if (begins[middle] <= p * PAGE) j = middle;
            else behind = middle;
        }
        for (; j < count && begins[j] < (p + 1) * PAGE; j++) {
            const int first = max(begins[j], low), from = max(first - p * PAGE, 0);
            const int to = min(first + (int)weight[j] - p * PAGE, PAGE);
            if (to > from) words[p] |= (to < 32 ? (1u << to) - 1 : FULL_WARP) & FULL_WARP << from;
        }
    }
    __syncthreads();
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = words[p] == FULL_WARP;
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks, words);
}
