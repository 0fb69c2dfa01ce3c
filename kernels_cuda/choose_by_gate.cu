// Which pages a prompt's queries read, by a learnt gate: queries pooled over a block and keys over GATE_BLOCK tokens, both before rotary
// embedding, mapped by a matrix of each head and rotated, and the softmax of their products (SeerAttention, arXiv 2410.13276; the reference
// is policies/prefill/seer_attention.py).
//   pool_keys      pooled keys [gate blocks of all sequences][kv_heads][3 * head_dim] float32: maximum, minimum and mean of each channel.
//                  Cached keys are turned back. Grid (pages / 2, kv_heads, sequences), block 128
//   pool_queries   pooled queries [query blocks of all sequences][num_heads][head_dim] float32. Grid (query blocks, num_heads, sequences),
//                  block 128
//   map_pools      what the gate makes of both: [...][heads][width] float32, queries in powers of 2.
//                  Grid (eights of blocks, kv_heads + num_heads, sequences), block 128
//   choose_by_gate  the lists. Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: `width` floats and 5 bytes a page
#include "page_values.cuh"
#include "prefill_means.cuh"

#define GATE_BLOCK 64  // keys
#define ROWS 8         // of a tile
#define GATE_ARGS(X) X(keys) X(queries) X(mapped_keys) X(mapped_queries) X(gate_q) X(gate_k) X(gate_cos) X(gate_sin) X(width) X(pairs) \
    X(threshold) X(fraction)
#define GATE_PARAMETERS GATE_ARGS(AS_PARAMETER) i64 unused
#define MAKE_GATE Gate{GATE_ARGS(AS_VALUE)}

// pairs: of channels that the gate's own rotary tables turn; 0: it has the model's. fraction: bits of a double, so that as many blocks are
// chosen as Python's floats say; 0: by threshold.
struct Gate {
    GATE_ARGS(AS_FIELD)

    // Of a sequence's first gate block.
    __device__ __forceinline__ i64 place(const QueryBlock& here) const
    {
        return here.page_place / 2 + here.place - here.first / QUERY_BLOCK;
    }
    __device__ __forceinline__ float2 angle(const Call& call, int position, int i) const
    {
        const i64 at_pair = pairs ? position * pairs + i : position * call.cos_stride + i;
        return make_float2(at<float>(pairs ? gate_cos : call.cos)[at_pair], at<float>(pairs ? gate_sin : call.sin)[at_pair]);
    }
};

struct Pool {
    float most, least, sum;

    __device__ __forceinline__ Pool() : most(-infinity()), least(infinity()), sum(0) {}
    __device__ __forceinline__ void add(float x) { most = fmaxf(most, x), least = fminf(least, x), sum += x; }
    __device__ __forceinline__ void store(float* to, int depth, int c, int tokens)
    {
        most = warp_max(most), least = -warp_max(-least), sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) to[c] = most, to[depth + c] = least, to[2 * depth + c] = sum / tokens;
    }
};

// A lane has a token of each of two pages, a warp some pairs of channels that were turned together, or single channels behind these.
KERNEL pool_keys(CALL_PARAMETERS CHOICE_PARAMETERS GATE_PARAMETERS)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Gate gate = MAKE_GATE;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int half = (int)call.rotary_dim / 2, units = depth - half, each = (units + 3) / 4;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int begin = blockIdx.x * GATE_BLOCK, tokens = min(GATE_BLOCK, call.slots(s, head) - begin);
    if (tokens <= 0) return;
    const int* table = call.table(s, head) + begin / PAGE;
    const int entries[2] = {table[0], tokens > PAGE ? table[1] : -1};
    float* to = at<float>(keys) + ((gate.place(start) + blockIdx.x) * call.kv_heads + head) * 3 * depth;
    for (int unit = warp * each; unit < min(units, (warp + 1) * each); unit++) {
        const bool turned = unit < half;
        const int a = turned ? (call.interleaved ? 2 * unit : unit) : half + unit, b = call.interleaved ? a + 1 : a + half;
        Pool first, second;
#pragma unroll
        for (int part = 0; part < 2; part++) {
            const int t = part * PAGE + lane;
            if (t >= tokens) continue;
            const Page page(call.pools, max(entries[part], 0));
            const float x = entries[part] >= 0 ? key_at(page, depth, a, lane) : 0;
            if (!turned) {
                first.add(x);
                continue;
            }
            const float y = entries[part] >= 0 ? key_at(page, depth, b, lane) : 0;
            const i64 at_pair = (begin + t) * call.cos_stride + unit;
            const float cosine = at<float>(call.cos)[at_pair], sine = at<float>(call.sin)[at_pair];
            const float factor = 1 / (cosine * cosine + sine * sine);
            first.add((x * cosine + y * sine) * factor), second.add((y * cosine - x * sine) * factor);
        }
        first.store(to, depth, a, tokens);
        if (turned) second.store(to, depth, b, tokens);
    }
}

KERNEL pool_queries(CALL_PARAMETERS CHOICE_PARAMETERS GATE_PARAMETERS)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim;
    const QueryBlock here(call, choice, s, head / call.group(), blockIdx.x);
    if (!here.there) return;
    const float* rows = at<float>(call.q) + (call.first_row(s) + here.first) * call.q_stride + head * depth;
    for (int c = threadIdx.x; c < depth; c += blockDim.x) {
        float sum = 0;
#pragma unroll 8
        for (int r = 0; r < here.rows; r++) sum += rows[r * call.q_stride + c];
        at<float>(queries)[(here.place * call.num_heads + head) * depth + c] = sum / here.rows;
    }
}

KERNEL map_pools(CALL_PARAMETERS CHOICE_PARAMETERS GATE_PARAMETERS)
{
    __shared__ float x[3 * MOST_DEPTH][ROWS];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Gate gate = MAKE_GATE;
    const int s = blockIdx.z, depth = (int)call.head_dim, first = blockIdx.x * ROWS;
    const bool of_keys = blockIdx.y < call.kv_heads;
    const int head = of_keys ? blockIdx.y : blockIdx.y - (int)call.kv_heads, kv_head = of_keys ? head : head / call.group();
    const QueryBlock start(call, choice, s, kv_head, 0);
    if (!start.there) return;
    const int blocks = of_keys ? (call.slots(s, kv_head) + GATE_BLOCK - 1) / GATE_BLOCK : start.blocks, rows = min(ROWS, blocks - first);
    if (rows <= 0) return;
    const int size = of_keys ? 3 * depth : depth;
    const i64 heads = of_keys ? call.kv_heads : call.num_heads, row = (of_keys ? gate.place(start) : start.place) + first;
    const float* from = at<float>(of_keys ? keys : queries) + (row * heads + head) * size;
    for (int n = threadIdx.x; n < ROWS * size; n += blockDim.x) {
        const int r = n / size, c = n % size;
        x[c][r] = r < rows ? from[r * heads * size + c] : 0;
    }
    __syncthreads();
    const float* matrix = at<float>(of_keys ? gate_k : gate_q) + (call.layer * heads + head) * size * width;
    float* to = at<float>(of_keys ? mapped_keys : mapped_queries) + (row * heads + head) * width;
    const float factor = of_keys ? 1 : rsqrtf((float)width) * LOG2E;
    for (int n = threadIdx.x; n < width; n += blockDim.x) {
        float sum[ROWS] = {};
#pragma unroll 4
        for (int c = 0; c < size; c++) {
            const float weight = matrix[c * width + n];
#pragma unroll
            for (int r = 0; r < ROWS; r++) sum[r] = fmaf(x[c][r], weight, sum[r]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (r < rows) to[r * heads * width + n] = sum[r] * factor;
    }
    __syncthreads();
    const int half = gate.pairs ? (int)gate.pairs : (int)call.rotary_dim / 2;
    for (int n = threadIdx.x; n < rows * half; n += blockDim.x) {
        const int r = n / half, i = n % half, position = (of_keys ? 0 : start.past) + (first + r) * GATE_BLOCK;
        const float2 angle = gate.angle(call, position, i);
        float* own = to + r * heads * width;
        const float a = own[i], b = own[i + half];
        own[i] = a * angle.x - b * angle.y, own[i + half] = b * angle.x + a * angle.y;
    }
}

KERNEL choose_by_gate(CALL_PARAMETERS CHOICE_PARAMETERS GATE_PARAMETERS)
{
    DYNAMIC_SHARED(float, memory);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Gate gate = MAKE_GATE;
    const int s = blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float *query = memory, *weights = memory + width;
    u8* marks = reinterpret_cast<u8*>(weights + here.pages);
    const int end = here.past + here.first + here.rows;  // gate blocks with nothing behind it
    const int blocks = end == call.slots(s, head) ? (end + GATE_BLOCK - 1) / GATE_BLOCK : end / GATE_BLOCK;
    const float* pages = at<float>(mapped_keys) + (gate.place(here) * call.kv_heads + head) * width;
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p);
    const auto mark = [&](int block) {
        for (int p = 2 * block; p < min(2 * block + 2, here.pages); p++) marks[p] = 1;
    };
    for (int h = head * call.group(); h < (head + 1) * call.group() && !here.whole && blocks; h++) {
        __syncthreads();
        for (int c = threadIdx.x; c < width; c += CHOICE_THREADS)
            query[c] = at<float>(mapped_queries)[(here.place * call.num_heads + h) * width + c];
        __syncthreads();
        for (int b = warp; b < blocks; b += CHOICE_WARPS) {
            const float* x = pages + b * call.kv_heads * width;
            float score = 0;
            for (int c = lane; c < width; c += 32) score = fmaf(query[c], x[c], score);
            score = warp_sum(score);
            if (lane == 0) weights[b] = score;
        }
        __syncthreads();
        scores_to_weights(room, weights, blocks);
        __syncthreads();
        const double part = __longlong_as_double(fraction);
        if (part > 0) pick(room, weights, mark, blocks, 0, 0, (int)ceil(part * blocks), (int)ceil(part * blocks));
        for (int b = threadIdx.x; b < blocks && part == 0; b += CHOICE_THREADS)
            if (weights[b] >= __int_as_float((int)threshold)) mark(b);
    }
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
