// Which pages a prompt's queries read, by estimates of all scores in eight bits (SALE, arXiv 2505.24179; the references are
// score_excess and policies/prefill/sale.py, whose four bits take no less here). The pages that are read anyhow give each row the sum
// that its scores with all other keys are held against.
//   mean_of_keys     key_mean [sequences][kv_heads][head_dim] float32, of the first new tokens. Grid (kv_heads, sequences), block 128
//   round_keys       keys [pages of all sequences][kv_heads][32][head_dim] bytes, less that mean, key_steps [the same][32] float32.
//                    Grid (pages, kv_heads, sequences), block 256
//   round_queries    queries [num_heads][query blocks of all sequences][64][head_dim] bytes, query_steps [the same][64] float32; found
//                    [kv_heads][query blocks][max_pages] bytes, zeros. Grid (query blocks, num_heads, sequences), block 256
//   scan_scores      found: pages with a score above its row's limit, for some head of the group.
//                    Grid (query blocks, pairs of heads, sequences), block 256: a warp has 16 rows
//   choose_by_excess the lists. Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: a byte a page
#include "page_values.cuh"
#include "prefill_choice.cuh"

#define LEVELS 127
#define MEAN_TOKENS 64  // whose mean key is taken away
#define PAIR 2          // heads of a block; pages of a stage
#define EXCESS_ARGS(X) X(key_mean) X(keys) X(key_steps) X(queries) X(query_steps) X(found) X(places) X(thresholds) X(threshold)
#define EXCESS_PARAMETERS EXCESS_ARGS(AS_PARAMETER)
#define MAKE_EXCESS Excess{EXCESS_ARGS(AS_VALUE)}

struct Excess { EXCESS_ARGS(AS_FIELD) };

KERNEL mean_of_keys(CALL_PARAMETERS CHOICE_PARAMETERS EXCESS_PARAMETERS i64 unused)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Excess excess = MAKE_EXCESS;
    const int s = blockIdx.y, head = blockIdx.x, depth = (int)call.head_dim;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int tokens = min(call.rows(s), MEAN_TOKENS);
    for (int c = threadIdx.x; c < depth; c += blockDim.x) {
        float sum = 0;
        for (int t = 0; t < tokens; t++) {
            const int slot = start.past + t, entry = call.table(s, head)[slot / PAGE];
            sum += entry < 0 ? 0 : key_at(Page(call.pools, entry), depth, c, slot % PAGE);
        }
        at<float>(excess.key_mean)[(s * call.kv_heads + head) * depth + c] = sum / tokens;
    }
}

// A row of floats, lanes' channels lane, lane + 32 ..., to bytes in steps; -> the step.
template <int CHUNKS> __device__ __forceinline__ float round_row(const float (&x)[CHUNKS], int depth, i8* to, int lane)
{
    float top = 1e-30f;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) top = fmaxf(top, fabsf(x[i]));
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < CHUNKS; i++)
        if (32 * i + lane < depth) to[32 * i + lane] = (i8)__float2int_rn(x[i] * (LEVELS / top));
    return top / LEVELS;
}

KERNEL round_keys(CALL_PARAMETERS CHOICE_PARAMETERS EXCESS_PARAMETERS i64 unused)
{
    __shared__ float held[128 * (PAGE + 1)];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Excess excess = MAKE_EXCESS;
    const int s = blockIdx.z, head = blockIdx.y, number = blockIdx.x, depth = (int)call.head_dim, warp = threadIdx.x / 32;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int tokens = min(PAGE, call.slots(s, head) - number * PAGE);
    if (tokens <= 0) return;
    const int entry = call.table(s, head)[number], lane = threadIdx.x % 32;
    const float* mean = at<float>(excess.key_mean) + (s * call.kv_heads + head) * depth;
    for (int n = threadIdx.x; n < depth * PAGE; n += blockDim.x)
        held[n / PAGE * (PAGE + 1) + n % PAGE] =
            entry >= 0 && n % PAGE < tokens ? key_at(Page(call.pools, entry), depth, n / PAGE, n % PAGE) - mean[n / PAGE] : 0;
    __syncthreads();
    const i64 place = (start.page_place + number) * call.kv_heads + head;
    for (int t = warp; t < PAGE; t += blockDim.x / 32) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = 32 * i + lane < depth ? held[(32 * i + lane) * (PAGE + 1) + t] : 0;
        const float step = round_row<4>(x, depth, at<i8>(excess.keys) + (place * PAGE + t) * depth, lane);
        if (lane == 0) at<float>(excess.key_steps)[place * PAGE + t] = step;
    }
}

KERNEL round_queries(CALL_PARAMETERS CHOICE_PARAMETERS EXCESS_PARAMETERS i64 unused)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Excess excess = MAKE_EXCESS;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim, group = call.group(), lane = threadIdx.x % 32;
    const QueryBlock here(call, choice, s, head / group, blockIdx.x);
    if (!here.there) return;
    const i64 place = head * excess.places + here.place;
    for (int t = threadIdx.x / 32; t < QUERY_BLOCK; t += blockDim.x / 32) {
        const int row = call.first_row(s) + here.first + min(t, here.rows - 1);
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = 32 * i + lane;
            x[i] = c >= depth ? 0 : rotated(call, at<float>(call.q) + row * call.q_stride + head * depth, at<i64>(call.positions)[row], c)
                * call.scale() * LOG2E;
        }
        const float step = round_row<4>(x, depth, at<i8>(excess.queries) + (place * QUERY_BLOCK + t) * depth, lane);
        if (lane == 0) at<float>(excess.query_steps)[place * QUERY_BLOCK + t] = step;
    }
    if (head % group) return;
    u8* marks = at<u8>(excess.found) + (head / group * excess.places + here.place) * call.max_pages;
    for (int p = threadIdx.x; p < here.pages; p += blockDim.x) marks[p] = 0;
}

// Where 16 bytes of a token's key stand: pieces exchanged so that ldmatrix meets no bank twice.
template <int D> __device__ __forceinline__ int piece_of(int token, int piece)
{
    return token * D + (D == 128 ? piece ^ token % 8 : piece ^ token / 2 % 4) * 16;
}

template <int D> struct Stages {
    i8 keys[3][PAIR * PAGE * D];
    float steps[3][PAIR * PAGE];
};

template <int D> __device__ __forceinline__ void scan(const Call& call, const Choice& choice, const Excess& excess)
{
    __shared__ Stages<D> shared;
    wait_previous();
    const int group = call.group(), pairs = (group + PAIR - 1) / PAIR, s = blockIdx.z, head = blockIdx.y / pairs;
    if (s >= call.sequences()) return;
    const int blocks = (call.rows(s) + QUERY_BLOCK - 1) / QUERY_BLOCK, block = blocks - 1 - (int)blockIdx.x;  // who sees most comes first
    if (block < 0) return;
    const QueryBlock here(call, choice, s, head, block);
    if (!here.there || here.whole) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const int of_group = min(blockIdx.y % pairs * PAIR + warp / 4, group - 1), own = head * group + of_group, row0 = warp % 4 * 16;
    const i64 place = own * excess.places + here.place;
    const i8* query = at<i8>(excess.queries) + (place * QUERY_BLOCK + row0) * D;
    u32 q[D / 32][4];
    float step[2];
#pragma unroll
    for (int k = 0; k < D / 32; k++)
#pragma unroll
        for (int i = 0; i < 4; i++) q[k][i] = *reinterpret_cast<const u32*>(query + (g + 8 * (i % 2)) * D + 32 * k + 16 * (i / 2) + 4 * j);
#pragma unroll
    for (int r = 0; r < 2; r++) step[r] = at<float>(excess.query_steps)[place * QUERY_BLOCK + row0 + g + 8 * r];

    // pages that are read anyhow, an even number of places, then the others
    const int sink = min((int)choice.sink, here.pages), near = max(sink, here.near), anyhow = sink + here.pages - near;
    const int first = (anyhow + 1) / PAIR * PAIR, total = first + max(0, near - sink), turns = (total + PAIR - 1) / PAIR;
    if (near <= sink) return;
    auto page_at = [&](int i) { return i < sink ? i : i < anyhow ? near + i - sink : i < first ? -1 : i < total ? sink + i - first : -1; };
    auto load = [&](int turn) {
        if (turn < turns)
            for (int n = threadIdx.x; n < PAIR * PAGE * (D / 16 + 1); n += blockDim.x) {
                const int t = n / (D / 16 + 1), piece = n % (D / 16 + 1), page = max(0, page_at(PAIR * turn + t / PAGE));
                const i64 from = ((here.page_place + page) * call.kv_heads + head) * PAGE + t % PAGE;
                if (piece < D / 16) cp_async16(shared.keys[turn % 3] + piece_of<D>(t, piece), at<i8>(excess.keys) + from * D + 16 * piece);
                else shared.steps[turn % 3][t] = at<float>(excess.key_steps)[from];
            }
        cp_async_commit();
    };
    const int mine[2] = {here.past + here.first + row0 + g, here.past + here.first + row0 + g + 8};
    float top[2] = {LOWEST, LOWEST}, sum[2] = {}, limit[2] = {infinity(), infinity()};
    u8* marks = at<u8>(excess.found) + (head * excess.places + here.place) * call.max_pages;
    load(0), load(1);
    for (int turn = 0; turn < turns; turn++) {
        cp_async_wait<1>();
        __syncthreads();
        load(turn + 2);
        if (turn == first / PAIR) {  // the sums are known: what passes the limit stands out; in the unit of integer products
            const float part = excess.thresholds ? at<float>(excess.thresholds)[call.layer * call.num_heads + own]
                                                 : __int_as_float((int)excess.threshold);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float best = quad_max(top[r]);
                const float all = quad_sum(sum[r] * exp2f(top[r] - best));
                limit[r] = part < 1e-5f ? -infinity() : (best + log2f(part * all)) / step[r];
            }
        }
        const i8* keys = shared.keys[turn % 3];
        const float* steps = shared.steps[turn % 3];
#pragma unroll
        for (int half = 0; half < PAIR; half++) {
            const int number = PAIR * turn + half, page = page_at(number);
            bool passes = false;
#pragma unroll
            for (int n = 0; n < PAGE / 8; n += 2) {
                i32 product[2][4] = {};
#pragma unroll
                for (int k = 0; k < D / 32; k++) {
                    u32 b[4];
                    load_matrices(b, keys + piece_of<D>(half * PAGE + 8 * n + lane % 16, 2 * k + lane / 16));
                    mma_s8(product[0], q[k], b[0], b[2]);
                    mma_s8(product[1], q[k], b[1], b[3]);
                }
#pragma unroll
                for (int m = 0; m < 2; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int column = 8 * (n + m) + 2 * j + i % 2;
                        const float x = product[m][i] * steps[half * PAGE + column];
                        if (number >= first) passes |= x > limit[i / 2];
                        else if (page >= 0 && page * PAGE + column <= mine[i / 2]) {
                            const float score = x * step[i / 2], best = fmaxf(top[i / 2], score);
                            sum[i / 2] = sum[i / 2] * exp2f(top[i / 2] - best) + exp2f(score - best), top[i / 2] = best;
                        }
                    }
            }
            if (page >= 0 && __any_sync(FULL_WARP, passes) && lane == 0) marks[page] = 1;
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) scan_scores_64(CALL_PARAMETERS CHOICE_PARAMETERS EXCESS_PARAMETERS i64 unused)
{
    scan<64>(MAKE_CALL, MAKE_CHOICE, MAKE_EXCESS);
}
extern "C" __global__ void __launch_bounds__(256) scan_scores_128(CALL_PARAMETERS CHOICE_PARAMETERS EXCESS_PARAMETERS i64 unused)
{
    scan<128>(MAKE_CALL, MAKE_CHOICE, MAKE_EXCESS);
}

KERNEL choose_by_excess(CALL_PARAMETERS CHOICE_PARAMETERS EXCESS_PARAMETERS i64 unused)
{
    DYNAMIC_SHARED(u8, marks);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Excess excess = MAKE_EXCESS;
    const int s = blockIdx.z, head = blockIdx.y;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    const u8* chosen = at<u8>(excess.found) + (head * excess.places + here.place) * call.max_pages;
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p) || chosen[p];
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
