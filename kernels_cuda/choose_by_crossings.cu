// Which pages a prompt's queries read, by the weight of lines that cross them (DHSA, arXiv 2510.24606, its mode vs; the reference is
// policies/prefill/dhsa.py). Lines are of each query head alone, keys and distances, half of the budget each, with most of the weight that
// the newest 64 queries give them, as choose_by_lines.cu has added it up.
//   pick_crossings  by_key and near [num_heads][slots of all sequences] float32: weights of what is not among the best become 0, near those
//                   of distances, of which `far` had a part; down [num_heads][pages of all sequences], of the keys of a page.
//                   Grid (2, num_heads, sequences), block CHOICE_THREADS
//   choose_by_crossings  the lists: of each query head so many pages as are a part of all. Grid (query blocks, kv_heads, sequences), block
//                   CHOICE_THREADS, shared: 5 bytes a page
#include "prefill_choice.cuh"

#define SAMPLED 64
#define TILE 64
#define CROSSING_PARAMETERS i64 by_key, i64 near, i64 far, i64 down, i64 page_places, i64 density

// density: bits of a double, so that as many pages are chosen as Python's floats say
__device__ __forceinline__ int pages_to_choose(const Call& call, int s, int head, i64 density)
{
    return max(1, (int)(__longlong_as_double(density) * ((call.slots(s, head) + PAGE - 1) / PAGE)));
}

KERNEL pick_crossings(CALL_PARAMETERS CHOICE_PARAMETERS CROSSING_PARAMETERS)
{
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y, kv_head = head / call.group();
    const bool across = blockIdx.x == 1;
    const QueryBlock start(call, choice, s, kv_head, 0);
    if (!start.there) return;
    const int slots = call.slots(s, kv_head), rows = min(SAMPLED, call.rows(s)), tiles = (slots + TILE - 1) / TILE;
    const i64 first = (head * page_places + start.page_place) * PAGE;
    float* weights = at<float>(across ? near : by_key) + first;
    const float* others = at<float>(far) + first;
    for (int n = threadIdx.x; n < slots && across; n += CHOICE_THREADS) {  // of the tiles that know this distance (choose_by_lines.cu)
        const int tile = -((n - (slots - rows - TILE + 1)) >> 6);
        weights[n] = (tile >= 0 && tile < tiles ? weights[n] : 0) + (tile >= -1 && tile + 1 < tiles ? others[n] : 0);
    }
    __syncthreads();
    const int half = pages_to_choose(call, s, kv_head, density) * PAGE / 2;
    pick(room, weights, [&](int n) { weights[n] = -weights[n]; }, slots, 0, 0, half, half);
    for (int n = threadIdx.x; n < slots; n += CHOICE_THREADS) weights[n] = fmaxf(-weights[n], 0);
    __syncthreads();
    for (int p = threadIdx.x; p * PAGE < slots && !across; p += CHOICE_THREADS) {
        float sum = 0;
        for (int n = p * PAGE; n < min(slots, (p + 1) * PAGE); n++) sum += weights[n];
        at<float>(down)[head * page_places + start.page_place + p] = sum;
    }
}

KERNEL choose_by_crossings(CALL_PARAMETERS CHOICE_PARAMETERS CROSSING_PARAMETERS)
{
    DYNAMIC_SHARED(float, memory);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float* weights = memory;
    u8* marks = reinterpret_cast<u8*>(memory + here.pages);
    const int count = pages_to_choose(call, s, head, density), slots = call.slots(s, head), first = here.past + here.first;
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p);
    for (int h = head * call.group(); h < (head + 1) * call.group() && !here.whole; h++) {
        const i64 own = h * page_places + here.page_place;
        const float* distances = at<float>(near) + own * PAGE;
        __syncthreads();
        for (int p = warp; p < here.pages; p += CHOICE_WARPS) {
            // distances from the block's first query to the page's last key, up to those from the last one to its first
            const int end = min(slots, first + here.rows - p * PAGE);
            float sum = 0;
            for (int n = max(0, first - (p + 1) * PAGE + 1) + lane; n < end; n += 32) sum += distances[n];
            sum = warp_sum(sum);
            if (lane == 0) weights[p] = sum + at<float>(down)[own + p];
        }
        __syncthreads();
        pick(room, weights, marks, here.pages, 0, 0, count, count);
    }
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
