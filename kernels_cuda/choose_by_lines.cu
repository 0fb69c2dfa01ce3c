// Which pages and single keys a prompt's queries read, by lines through the softmax weights of its last queries: down, a key that all read,
// and across, a distance (MInference, arXiv 2407.02490; the reference is policies/prefill/minference.py). The weights are computed twice,
// once for each row's sum and once to be added up, and never kept. Sums are made in one order, so that runs are alike.
//   arrange_sampled  queries [num_heads][sequences that have lists][64][head_dim] halves; lines, zeros.
//                    Grid (num_heads, sequences), block 256
//   line_tops        partials [num_heads][pages of all sequences][64] float2: of a row and page the largest score and the sum of the
//                    exponentials less that one.  Grid (pairs of pages, kv_heads, sequences), block 128: a warp has 16 rows
//   line_totals      totals [num_heads][sequences that have lists][64] float32, log2 of a row's sum.
//                    Grid (8, num_heads, sequences), block 256
//   line_sums        by_key, near, far [num_heads][slots of all sequences] float32: weights by key and by distance, of which two tiles of
//                    keys have a part each. They lie where the partials were. Grid and block of line_tops
//   pick_lines       verticals, slashes [kv_heads][pages of all sequences] words: bit t of page p is key, or distance, 32 * p + t.
//                    Grid (2, num_heads, sequences), block CHOICE_THREADS
//   choose_by_lines  the lists. Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: a byte a page, of patterns five
#include "page_tiles.cuh"
#include "prefill_means.cuh"

#define SAMPLED 64
#define TILE 64  // keys
#define FIRST_KEYS 30        // that come first (minference.py, VERTICALS)
#define FIRST_DISTANCES 100  // (SLASHES)
#define LINE_ARGS(X) X(queries) X(partials) X(totals) X(by_key) X(near) X(far) X(verticals) X(slashes) X(means) X(places) X(page_places) \
    X(sampled) X(patterns) X(n_v) X(n_s)
#define LINE_PARAMETERS LINE_ARGS(AS_PARAMETER)
#define MAKE_LINES Lines{LINE_ARGS(AS_VALUE)}

enum Shape { A_SHAPE, VERTICAL_SLASH, BLOCK_SPARSE };
struct Pattern { int kind, n_v, n_s; };

struct Lines {
    LINE_ARGS(AS_FIELD)

    __device__ __forceinline__ Pattern of(const Call& call, int head) const
    {
        if (patterns == 0) return {VERTICAL_SLASH, (int)n_v, (int)n_s};
        const int* own = at<int>(patterns) + 3 * (call.layer * call.num_heads + head);
        return {own[0], own[1], own[2]};
    }
    // Of a query head, the first of its rows of queries and totals; number: of the sequence.
    __device__ __forceinline__ i64 row(int number, int head) const { return (head * places + number) * SAMPLED; }
    __device__ __forceinline__ i64 slot(const QueryBlock& start, int head) const
    {
        return (head * page_places + start.page_place) * PAGE;
    }
};

// Where sequence s is among those that have lists.
__device__ __forceinline__ int number_of(const Call& call, int s)
{
    int number = 0;
    for (int i = 0; i < s; i++) number += at<i64>(call.prefill_lists)[i] != 0;
    return number;
}

KERNEL arrange_sampled(CALL_PARAMETERS CHOICE_PARAMETERS LINE_PARAMETERS i64 unused)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Lines lines = MAKE_LINES;
    const int s = blockIdx.y, head = blockIdx.x, depth = (int)call.head_dim, kv_head = head / call.group();
    const QueryBlock start(call, choice, s, kv_head, 0);
    if (!start.there) return;
    const int rows = min((int)lines.sampled, call.rows(s)), first = call.first_row(s) + call.rows(s) - rows;
    u16* to = at<u16>(lines.queries) + lines.row(number_of(call, s), head) * depth;
    for (int n = threadIdx.x; n < SAMPLED * depth; n += blockDim.x) {
        const int row = first + min(n / depth, rows - 1);
        const float* query = at<float>(call.q) + row * call.q_stride + head * depth;
        to[n] = float_to_half(rotated(call, query, at<i64>(call.positions)[row], n % depth) * call.scale() * LOG2E);
    }
    if (head % call.group()) return;
    const int pages = (call.slots(s, kv_head) + PAGE - 1) / PAGE;
    const i64 own = kv_head * lines.page_places + start.page_place;
    for (int p = threadIdx.x; p < pages; p += blockDim.x) at<u32>(lines.verticals)[own + p] = 0, at<u32>(lines.slashes)[own + p] = 0;
}

// SUMS: weights by line; else what each row's sum is made of.
template <int D, bool SUMS> __device__ __forceinline__ void sample_lines(const Call& call, const Choice& choice, const Lines& lines)
{
    __shared__ uint4 memory[2 * D * 64 / 16];
    __shared__ float weights[SUMS ? SAMPLED : 1][TILE + 1];
    u8* keys = reinterpret_cast<u8*>(memory);
    wait_previous();
    const int s = blockIdx.z, head = blockIdx.y, begin = blockIdx.x * TILE;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int slots = call.slots(s, head), rows = min((int)lines.sampled, call.rows(s)), group = call.group();
    bool asked = false;
    for (int h = 0; h < group; h++) asked |= lines.of(call, head * group + h).kind == VERTICAL_SLASH;
    if (begin >= slots || !asked) return;
    bool there[2];
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const int page = begin / PAGE + part, entry = page * PAGE < slots ? call.table(s, head)[page] : -1;
        there[part] = entry >= 0;
        if (there[part]) fetch_keys<D>(Page(call.pools, entry), keys + part * D * 64);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const int number = number_of(call, s);
    for (int h = 0; h < group; h++) {
        const int own = head * group + h;
        if (lines.of(call, own).kind != VERTICAL_SLASH) continue;
        const i64 place = lines.row(number, own) + 16 * warp;
        const u16* query = at<u16>(lines.queries) + place * D;
        float score[TILE / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            u32 q[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                q[i] = *reinterpret_cast<const u32*>(query + (g + 8 * (i % 2)) * D + 16 * k + 8 * (i / 2) + 2 * j);
#pragma unroll
            for (int n = 0; n < TILE / 8; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, keys + n / 4 * D * 64 + key_piece<D>(16 * k + lane % 16, n % 4 + lane / 16));
                mma_f16(score[n], q, b[0], b[1]);
                mma_f16(score[n + 1], q, b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = 16 * warp + g + 8 * (i / 2), slot = begin + 8 * n + 2 * j + i % 2;
                if (!there[n / 4] || slot > slots - rows + min(row, rows - 1)) score[n][i] = -infinity();
            }
        if (!SUMS) {
#pragma unroll
            for (int part = 0; part < 2; part++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float top = LOWEST, sum = 0;
#pragma unroll
                    for (int n = 4 * part; n < 4 * part + 4; n++) top = fmaxf(top, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
                    top = quad_max(top);
#pragma unroll
                    for (int n = 4 * part; n < 4 * part + 4; n++) sum += exp2f(score[n][2 * r] - top) + exp2f(score[n][2 * r + 1] - top);
                    sum = quad_sum(sum);
                    const i64 page = own * lines.page_places + start.page_place + begin / PAGE + part;
                    if (j == 0 && begin + part * PAGE < slots)
                        at<float2>(lines.partials)[page * SAMPLED + 16 * warp + g + 8 * r] = make_float2(top, sum);
                }
            continue;
        }
        const float total[2] = {at<float>(lines.totals)[place + g], at<float>(lines.totals)[place + g + 8]};
        __syncthreads();  // the head before has been added up
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                weights[SUMS ? 16 * warp + g + 8 * (i / 2) : 0][8 * n + 2 * j + i % 2] = exp2f(score[n][i] - total[i / 2]);
        __syncthreads();
        const int t = threadIdx.x, distance = slots - rows - begin - TILE + 1 + t;
        const i64 slot = lines.slot(start, own);
        if (t >= TILE && begin + t - TILE < slots) {
            float sum = 0;
            for (int r = 0; r < rows; r++) sum += weights[SUMS ? r : 0][t - TILE];
            at<float>(lines.by_key)[slot + begin + t - TILE] = sum;
        }
        if (distance >= 0 && distance < slots) {
            float sum = 0;  // of the last thread's distance nothing: it has no pairs in this tile
            for (int r = max(0, t - TILE + 1); r <= min(rows - 1, t); r++) sum += weights[SUMS ? r : 0][r + TILE - 1 - t];
            at<float>(t < TILE ? lines.near : lines.far)[slot + distance] = sum;
        }
    }
}

#define SAMPLE_KERNEL(name, D, SUMS)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(128) name(CALL_PARAMETERS CHOICE_PARAMETERS LINE_PARAMETERS i64 unused)                   \
    {                                                                                                                                      \
        sample_lines<D, SUMS>(MAKE_CALL, MAKE_CHOICE, MAKE_LINES);                                                                         \
    }
SAMPLE_KERNEL(line_tops_64, 64, false)
SAMPLE_KERNEL(line_tops_128, 128, false)
SAMPLE_KERNEL(line_sums_64, 64, true)
SAMPLE_KERNEL(line_sums_128, 128, true)

KERNEL line_totals(CALL_PARAMETERS CHOICE_PARAMETERS LINE_PARAMETERS i64 unused)
{
    __shared__ float2 found[32][8];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Lines lines = MAKE_LINES;
    const int s = blockIdx.z, head = blockIdx.y, kv_head = head / call.group(), row = blockIdx.x * 8 + threadIdx.x % 8;
    const QueryBlock start(call, choice, s, kv_head, 0);
    if (!start.there || lines.of(call, head).kind != VERTICAL_SLASH) return;
    const int pages = (call.slots(s, kv_head) + PAGE - 1) / PAGE;
    const float2* parts = at<float2>(lines.partials) + (head * lines.page_places + start.page_place) * SAMPLED + row;
    float top = LOWEST, sum = 0;
    auto add = [&](float2 other) {
        const float best = fmaxf(top, other.x);
        sum = sum * exp2f(top - best) + other.y * exp2f(other.x - best), top = best;
    };
#pragma unroll 4
    for (int p = threadIdx.x / 8; p < pages; p += 32) add(parts[p * SAMPLED]);
    found[threadIdx.x / 8][threadIdx.x % 8] = make_float2(top, sum);
    __syncthreads();
    if (threadIdx.x >= 8) return;
    for (int i = 1; i < 32; i++) add(found[i][threadIdx.x]);
    at<float>(lines.totals)[lines.row(number_of(call, s), head) + row] = top + log2f(fmaxf(sum, 1e-30f));
}

KERNEL pick_lines(CALL_PARAMETERS CHOICE_PARAMETERS LINE_PARAMETERS i64 unused)
{
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Lines lines = MAKE_LINES;
    const int s = blockIdx.z, head = blockIdx.y, kv_head = head / call.group();
    const bool across = blockIdx.x == 1;
    const QueryBlock start(call, choice, s, kv_head, 0);
    if (!start.there) return;
    const Pattern pattern = lines.of(call, head);
    if (pattern.kind == BLOCK_SPARSE) return;
    const int slots = call.slots(s, kv_head), rows = min((int)lines.sampled, call.rows(s));
    const int count = min(across ? pattern.n_s : pattern.n_v, slots);
    u32* words = at<u32>(across ? lines.slashes : lines.verticals) + kv_head * lines.page_places + start.page_place;
    const auto mark = [&](int n) { atomicOr(words + n / PAGE, 1u << n % PAGE); };
    if (pattern.kind == A_SHAPE) {
        for (int n = threadIdx.x; n < count; n += CHOICE_THREADS) mark(n);
        return;
    }
    float* weights = at<float>(across ? lines.near : lines.by_key) + lines.slot(start, head);
    const float* others = at<float>(lines.far) + lines.slot(start, head);
    const int tiles = (slots + TILE - 1) / TILE;
    for (int n = threadIdx.x; n < slots; n += CHOICE_THREADS) {
        if (across) {  // the tiles that know this distance: as numbered in sample_lines, where they are
            const int tile = -((n - (slots - rows - TILE + 1)) >> 6);
            weights[n] = (tile >= 0 && tile < tiles ? weights[n] : 0) + (tile >= -1 && tile + 1 < tiles ? others[n] : 0);
        }
        if (n < (across ? FIRST_DISTANCES : FIRST_KEYS)) weights[n] = infinity();
    }
    __syncthreads();
    pick(room, weights, mark, slots, 0, 0, count, count);
}

// Whether some of the distances from `least` up to `most` is among those of a word for 32 each.
__device__ __forceinline__ bool any_between(const u32* words, int least, int most)
{
    for (int w = least / PAGE; w * PAGE < most; w++) {
        u32 word = words[w];
        if (w * PAGE < least) word &= FULL_WARP << least % PAGE;
        if (most - w * PAGE < PAGE) word &= (1u << (most - w * PAGE)) - 1;
        if (word) return true;
    }
    return false;
}

KERNEL choose_by_lines(CALL_PARAMETERS CHOICE_PARAMETERS LINE_PARAMETERS i64 unused)
{
    DYNAMIC_SHARED(uint4, memory);
    __shared__ float query[MOST_DEPTH];
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Lines lines = MAKE_LINES;
    const int s = blockIdx.z, head = blockIdx.y;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float* weights = reinterpret_cast<float*>(memory);
    u8* marks = reinterpret_cast<u8*>(weights + (lines.patterns ? here.pages : 0));
    const i64 own = head * lines.page_places + here.page_place;
    const u32 *across = at<u32>(lines.slashes) + own, *down = at<u32>(lines.verticals) + own;
    const int first = here.past + here.first, end = first + here.rows;  // of the block's queries
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS)
        marks[p] = here.kept(choice, p) || any_between(across, max(0, first - (p + 1) * PAGE + 1), end - p * PAGE);
    __syncthreads();
    for (int h = 0; h < call.group() && lines.patterns && !here.whole; h++) {
        const Pattern pattern = lines.of(call, head * call.group() + h);
        if (pattern.kind != BLOCK_SPARSE) continue;
        weigh_means(call, here, s, head * call.group() + h, lines.means, query, weights);
        pick(room, weights, marks, here.pages, 0, 0, pattern.n_v / PAGE, pattern.n_v / PAGE);
    }
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks, down);
}
