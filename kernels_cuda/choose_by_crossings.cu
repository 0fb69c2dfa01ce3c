// Which pages a prompt's queries read, by the weight of lines that cross them (DHSA, arXiv 2510.24606, its modes vs and vsb; the reference
// is policies/prefill/dhsa.py). Lines are of each query head alone, units and distances in them, half of the budget each, with most of the
// weight that the newest 64 queries give them. Units are keys, whose weights choose_by_lines.cu has added up, or pages, by their mean key
// and the means of PAGE queries.
//   weigh_units     rows [2][num_heads][pages of all sequences] float32, softmax weights of pages. Grid (2, kv_heads, sequences), block
//                   CHOICE_THREADS
//   pick_crossings  by_unit and by_distance [num_heads][units of all sequences] float32: weights of what is not among the best become 0.
//                   rest: of keys, a part of what is to be added to distances; of pages, the rows. down [num_heads][pages of all
//                   sequences]: of the units of a page; of pages, by_unit itself. Grid (2, num_heads, sequences), block CHOICE_THREADS
//   choose_by_crossings  the lists: of each query head so many pages as are a part of all. Grid (query blocks, kv_heads, sequences), block
//                   CHOICE_THREADS, shared: 5 bytes a page
#include "prefill_means.cuh"

#define SAMPLED 64
#define TILE 64
#define CROSSING_ARGS(X) X(by_unit) X(by_distance) X(rest) X(down) X(means) X(page_places) X(unit) X(density)
#define CROSSING_PARAMETERS CROSSING_ARGS(AS_PARAMETER) i64 unused
#define MAKE_CROSSINGS Crossings{CROSSING_ARGS(AS_VALUE)}

// unit: tokens. density: bits of a double, so that as many pages are chosen as Python's floats say
struct Crossings {
    CROSSING_ARGS(AS_FIELD)

    __device__ __forceinline__ i64 page(const QueryBlock& start, int head) const { return head * page_places + start.page_place; }
    __device__ __forceinline__ int count(int slots) const
    {
        return max(1, (int)(__longlong_as_double(density) * ((slots + PAGE - 1) / PAGE)));
    }
};

// The newest queries, in rows of PAGE: which of n is the last one of row r.
__device__ __forceinline__ int last_of(int r, int n) { return min(max(0, n - SAMPLED) + (r + 1) * PAGE, n) - 1; }

KERNEL weigh_units(CALL_PARAMETERS CHOICE_PARAMETERS CROSSING_PARAMETERS)
{
    __shared__ float queries[HEADS][MOST_DEPTH];
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Crossings crossings = MAKE_CROSSINGS;
    const int s = blockIdx.z, head = blockIdx.y, r = blockIdx.x;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there || r * PAGE >= call.rows(s)) return;
    const int n = call.rows(s), first = max(0, n - SAMPLED) + r * PAGE, last = last_of(r, n), pages = (start.past + last) / PAGE + 1;
    float* own = at<float>(rest) + r * call.num_heads * page_places + crossings.page(start, head * call.group());
    score_means(call, start, head, call.first_row(s) + first, last + 1 - first, pages, means, queries, own, page_places);
    for (int h = 0; h < call.group(); h++) scores_to_weights(room, own + h * page_places, pages);
}

KERNEL pick_crossings(CALL_PARAMETERS CHOICE_PARAMETERS CROSSING_PARAMETERS)
{
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Crossings crossings = MAKE_CROSSINGS;
    const int s = blockIdx.z, head = blockIdx.y, kv_head = head / call.group(), size = (int)unit;
    const bool across = blockIdx.x == 1;
    const QueryBlock start(call, choice, s, kv_head, 0);
    if (!start.there) return;
    const int slots = call.slots(s, kv_head), rows = min(SAMPLED, call.rows(s)), tiles = (slots + TILE - 1) / TILE;
    const int units = (slots + size - 1) / size;
    const i64 first = crossings.page(start, head) * (PAGE / size);
    float* weights = at<float>(across ? by_distance : by_unit) + first;
    const float* others = at<float>(rest) + first;
    for (int n = threadIdx.x; n < units && size == 1 && across; n += CHOICE_THREADS) {
        // of the tiles that know this distance (choose_by_lines.cu)
        const int tile = -((n - (slots - rows - TILE + 1)) >> 6);
        weights[n] = (tile >= 0 && tile < tiles ? weights[n] : 0) + (tile >= -1 && tile + 1 < tiles ? others[n] : 0);
    }
    for (int p = threadIdx.x; p < units && size == PAGE; p += CHOICE_THREADS) {
        weights[p] = 0;
        for (int r = 0; r * PAGE < rows; r++) {
            const int own = (start.past + last_of(r, call.rows(s))) / PAGE;  // page
            if (p <= own) weights[p] += others[r * call.num_heads * page_places + (across ? own - p : p)];
        }
    }
    __syncthreads();
    const int half = (crossings.count(slots) * (PAGE / size) + 1) / 2;
    pick(room, weights, [&](int n) { weights[n] = -weights[n]; }, units, 0, 0, half, half);
    for (int n = threadIdx.x; n < units; n += CHOICE_THREADS) weights[n] = fmaxf(-weights[n], 0);
    __syncthreads();
    for (int p = threadIdx.x; p * PAGE < slots && size == 1 && !across; p += CHOICE_THREADS) {
        float sum = 0;
        for (int n = p * PAGE; n < min(slots, (p + 1) * PAGE); n++) sum += weights[n];
        at<float>(down)[crossings.page(start, head) + p] = sum;
    }
}

KERNEL choose_by_crossings(CALL_PARAMETERS CHOICE_PARAMETERS CROSSING_PARAMETERS)
{
    DYNAMIC_SHARED(float, memory);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Crossings crossings = MAKE_CROSSINGS;
    const int s = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32, size = (int)unit;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float* weights = memory;
    u8* marks = reinterpret_cast<u8*>(memory + here.pages);
    const int slots = call.slots(s, head), count = crossings.count(slots), units = (slots + size - 1) / size;
    const int first = here.past + here.first, last = first + here.rows - 1;
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p);
    for (int h = head * call.group(); h < (head + 1) * call.group() && !here.whole; h++) {
        const i64 own = crossings.page(here, h);
        const float* distances = at<float>(by_distance) + own * (PAGE / size);
        __syncthreads();
        for (int p = warp; p < here.pages; p += CHOICE_WARPS) {
            // from the block's first query to the page's last key, up to those from the last query to its first
            const int near = max(0, first / size - ((p + 1) * PAGE - 1) / size), far = min(units, last / size - p * PAGE / size + 1);
            float sum = 0;
            for (int n = near + lane; n < far; n += 32) sum += distances[n];
            sum = warp_sum(sum);
            if (lane == 0) weights[p] = sum + at<float>(down)[own + p];
        }
        __syncthreads();
        pick(room, weights, marks, here.pages, 0, 0, count, count);
    }
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
