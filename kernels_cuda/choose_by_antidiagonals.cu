// Which pages a prompt's queries read, by the antidiagonals of strides of tokens (XAttention, arXiv 2503.16428; the references are
// antidiagonal_weights and policies/prefill/xattention.py). A row is a stride of queries, a column a stride of keys, both of S tokens, and
// their score one product of S * head_dim channels, in halves: keys as they lie in their pages, where eight tokens of a channel are
// neighbours, queries brought into the same form, each stride backwards.
//   arrange_queries  arranged [num_heads][query blocks of all sequences][head_dim][64] halves. Grid (query blocks, num_heads, sequences)
//   edge_scores      edges [num_heads][query blocks][64 / S rows][2] float32: of the columns that a row may see in part, over the pairs
//                    that it sees. The same grid; block 128
//   score_strides    sums [rows][max_pages] halves, each page's exponentials less the row's largest score among 32 columns, and these,
//                    tops [rows][max_pages / S] float32.  Grid (tiles of 64 columns, tiles of 128 rows, kv_heads * sequences), block 256
//   choose_by_antidiagonals  the lists: of each query head as many pages as cover a part of the rows' softmax weights.
//                    Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: 5 bytes a page
// Rows, places of query blocks and shared memory of choosing: prefill_choice.cuh.
#include "page_tiles.cuh"
#include "prefill_choice.cuh"

#define SLICES 16  // of eight tokens of a channel, that are multiplied at a time
#define ROWS 128
#define COLUMNS 64
#define STRIDE_ARGS(X) X(arranged) X(edges) X(sums) X(tops) X(places) X(span)
#define STRIDE_PARAMETERS STRIDE_ARGS(AS_PARAMETER)
#define MAKE_STRIDES Strides{STRIDE_ARGS(AS_VALUE)}

struct Strides {
    STRIDE_ARGS(AS_FIELD)

    __device__ __forceinline__ int rows() const { return QUERY_BLOCK / (int)span; }  // of a block of queries
    __device__ __forceinline__ i64 row(int head, int place) const { return (head * places + place) * rows(); }
    __device__ __forceinline__ u16* block(int head, int place, int depth) const {
        return at<u16>(arranged) + (head * places + place) * depth * QUERY_BLOCK;
    }
};

// The query at place `j` of a block: token, counted from the block's first; the last one stands for those that lack.
__device__ __forceinline__ int token_at(int j, int stride, int rows)
{
    return min(j / stride * stride + stride - 1 - j % stride, rows - 1);
}

KERNEL arrange_queries(CALL_PARAMETERS CHOICE_PARAMETERS STRIDE_PARAMETERS i64 unused)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Strides strides = MAKE_STRIDES;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim;
    const QueryBlock here(call, choice, s, head / call.group(), blockIdx.x);
    if (!here.there) return;
    u16* to = strides.block(head, here.place, depth);
    const int first = call.first_row(s) + here.first;
    for (int n = threadIdx.x; n < QUERY_BLOCK * depth; n += blockDim.x) {
        const int row = first + token_at(n % QUERY_BLOCK, (int)strides.span, here.rows);
        const float* query = at<float>(call.q) + row * call.q_stride + head * depth;
        const float x = rotated(call, query, at<i64>(call.positions)[row], n / QUERY_BLOCK);
        to[n] = float_to_half(x * call.scale() * LOG2E);
    }
}

KERNEL edge_scores(CALL_PARAMETERS CHOICE_PARAMETERS STRIDE_PARAMETERS i64 unused)
{
    __shared__ float products[2 * QUERY_BLOCK];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Strides strides = MAKE_STRIDES;
    const int s = blockIdx.z, head = blockIdx.y, depth = (int)call.head_dim, stride = (int)strides.span;
    const QueryBlock here(call, choice, s, head / call.group(), blockIdx.x);
    if (!here.there) return;
    const int j = threadIdx.x % QUERY_BLOCK, which = threadIdx.x / QUERY_BLOCK, base = here.past + here.first;
    const int key = ((base + j / stride * stride) / stride + which) * stride + j % stride;
    const bool seen = key <= base + token_at(j, stride, here.rows) && j / stride * stride < here.rows;
    const int entry = seen ? call.table(s, head / call.group())[key / PAGE] : -1;
    float sum = 0;
    if (entry >= 0) {
        const Page page(call.pools, entry);
        const u16* query = strides.block(head, here.place, depth) + j;
        for (int c = 0; c < depth; c++) sum += half_to_float(query[c * QUERY_BLOCK]) * key_at(page, depth, c, key % PAGE);
    }
    products[threadIdx.x] = entry >= 0 ? sum : infinity();  // as a mark: products are finite
    __syncthreads();
    if (j % stride) return;
    float total = 0, count = 0;
    for (int i = 0; i < stride; i++)
        if (products[threadIdx.x + i] < infinity()) total += products[threadIdx.x + i], count++;
    at<float>(strides.edges)[2 * (strides.row(head, here.place) + j / stride) + which] = count > 0 ? total / count : -infinity();
}

struct Slices { u8 a[SLICES * ROWS * 16], b[SLICES * COLUMNS * 16]; };

// Slices of channels `c0` on of a tile's queries, whose rows are units of 64 / S: heads of the group, then blocks, of which `units` are.
__device__ __forceinline__ void fetch_rows(const Call& call, const Strides& strides, int head, int first_place, int blocks, int unit0,
                                           int units, int c0, u8* to)
{
    const int depth = (int)call.head_dim, per = strides.rows(), parts = (int)strides.span / 8;
    for (int n = threadIdx.x; n < SLICES * ROWS; n += blockDim.x) {
        const int slice = n / ROWS, row = n % ROWS, unit = min(unit0 + row / per, units - 1);
        const u16* from = strides.block(head * call.group() + unit / blocks, first_place + unit % blocks, depth);
        cp_async16(to + n * 16, from + (c0 + slice / parts) * QUERY_BLOCK + (row % per * parts + slice % parts) * 8);
    }
}

// The same of keys, of the pages `first` on; `count` there are.
__device__ __forceinline__ void fetch_columns(const Call& call, const Strides& strides, const int* table, int first, int count, int c0,
                                              u8* to)
{
    const int parts = (int)strides.span / 8, channels = SLICES / parts, depth = (int)call.head_dim;
    const auto place = [&](int page, int channel, int piece) {  // of eight tokens
        const int eight = page * (PAGE / 8) + piece;
        return to + ((channel * parts + eight % parts) * COLUMNS + eight / parts) * 16;
    };
    for (int n = threadIdx.x; n < SLICES * COLUMNS; n += blockDim.x) {
        const int page = n / 4 / channels, channel = n / 4 % channels, entry = first + page < count ? table[first + page] : -1;
        if (entry < 0) {
            *reinterpret_cast<uint4*>(place(page, channel, n % 4)) = make_uint4(0, 0, 0, 0);
            continue;
        }
        const Page held(call.pools, entry);
        if (held.kind(K_KIND) == F16)
            cp_async16(place(page, channel, n % 4), at<u8>(held.place(K) + (c0 + channel) * 2 * PAGE + 16 * (n % 4)));
        else if (channel % 4 == 0 && n % 4 < 2) {  // four channels, two times eight tokens
            const int quad = (c0 + channel) / 4, x = n % 4;
            const i64 params = held.place(K_PARAMS) + 8 * quad;
            const uint2 lows = *at<uint2>(params), steps = *at<uint2>(params + 2 * depth);
            u32 low[8], high[8];
            quad_codes(held.kind(K_KIND), held.place(K), depth, quad, x, low, high);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 minimum = __byte_perm(j < 2 ? lows.x : lows.y, 0, j % 2 ? 0x3232 : 0x1010);
                const u32 step = __byte_perm(j < 2 ? steps.x : steps.y, 0, j % 2 ? 0x3232 : 0x1010);
                *reinterpret_cast<uint4*>(place(page, channel + j, x)) = row_values(low, j, minimum, step);
                *reinterpret_cast<uint4*>(place(page, channel + j, x + 2)) = row_values(high, j, minimum, step);
            }
        }
    }
}

KERNEL __launch_bounds__(256) score_strides(CALL_PARAMETERS CHOICE_PARAMETERS STRIDE_PARAMETERS i64 unused)
{
    DYNAMIC_SHARED(uint4, memory);
    Slices* shared = reinterpret_cast<Slices*>(memory);
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Strides strides = MAKE_STRIDES;
    const int s = blockIdx.z / (int)call.kv_heads, head = blockIdx.z % (int)call.kv_heads, depth = (int)call.head_dim;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int stride = (int)strides.span, per = strides.rows(), units = call.group() * start.blocks;
    const int unit0 = blockIdx.y * (ROWS / per), column0 = blockIdx.x * COLUMNS;
    if (unit0 >= units) return;
    const int last_unit = min(unit0 + ROWS / per, units) - 1, slots = call.slots(s, head);
    // the block that sees most: the last of a head, where the tile goes on to another
    const int deepest = unit0 / start.blocks < last_unit / start.blocks ? start.blocks - 1 : last_unit % start.blocks;
    if (column0 * stride >= min(slots, start.past + (deepest + 1) * QUERY_BLOCK)) return;
    const int* table = call.table(s, head);
    const int first_page = column0 * stride / PAGE, page_count = (slots + PAGE - 1) / PAGE;
    const int channels = SLICES * 8 / stride, steps = depth / channels;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const int row0 = warp / 2 * 32, col0 = warp % 2 * 32;
    float score[2][4][4] = {};
    auto load = [&](int step) {
        fetch_rows(call, strides, head, start.place, start.blocks, unit0, units, step * channels, shared[step % 2].a);
        fetch_columns(call, strides, table, first_page, page_count, step * channels, shared[step % 2].b);
        cp_async_commit();
    };
    load(0);
    for (int step = 0; step < steps; step++) {
        if (step + 1 < steps) load(step + 1);
        else cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        const Slices& now = shared[step % 2];
#pragma unroll
        for (int k = 0; k < SLICES; k += 2) {
            u32 a[2][4], b[4];
#pragma unroll
            for (int m = 0; m < 2; m++) load_matrices(a[m], now.a + ((k + lane / 16) * ROWS + row0 + 16 * m + lane % 16) * 16);
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                load_matrices(b, now.b + ((k + lane / 16) * COLUMNS + col0 + 8 * n + lane % 16) * 16);
#pragma unroll
                for (int m = 0; m < 2; m++) mma_f16(score[m][n], a[m], b[0], b[2]), mma_f16(score[m][n + 1], a[m], b[1], b[3]);
            }
        }
        __syncthreads();
    }
    const float inverse = 1.0f / stride;
    const i64 max_tiles = (call.max_pages + stride - 1) / stride;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = row0 + 16 * m + 8 * r + g, unit = unit0 + row / per, block = unit % start.blocks;
            const bool there = unit < units;
            const i64 number = strides.row(head * call.group() + min(unit, units - 1) / start.blocks, start.place + block) + row % per;
            const int edge = (start.past + block * QUERY_BLOCK + row % per * stride) / stride;
            float top = LOWEST;
#pragma unroll
            for (int n = 0; n < 4; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int column = column0 + col0 + 8 * n + 2 * j + i;
                    float x = score[m][n][2 * r + i] * inverse;
                    if (column >= edge) x = there && column < edge + 2 ? at<float>(strides.edges)[2 * number + column - edge] : -infinity();
                    score[m][n][2 * r + i] = x, top = fmaxf(top, x);
                }
            top = quad_max(top);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float one = exp2f(score[m][n][2 * r] - top), two = exp2f(score[m][n][2 * r + 1] - top), both = one + two;
                const float four = both + __shfl_xor_sync(FULL_WARP, both, 1);
                const int page = (column0 + col0 + 8 * n + 2 * j) * stride / PAGE;
                u16* to = at<u16>(strides.sums) + number * call.max_pages;
                if (!there) continue;
                if (stride == PAGE) {
                    if (page < call.max_pages) to[page] = float_to_half(one);
                    if (page + 1 < call.max_pages) to[page + 1] = float_to_half(two);
                } else if (page < call.max_pages && (stride == PAGE / 2 || j % 2 == 0))
                    to[page] = float_to_half(stride == PAGE / 2 ? both : four);
            }
            const int tile = (column0 + col0) / 32;
            if (there && j == 0 && tile < max_tiles) at<float>(strides.tops)[number * max_tiles + tile] = top;
        }
}

KERNEL choose_by_antidiagonals(CALL_PARAMETERS CHOICE_PARAMETERS STRIDE_PARAMETERS i64 tau)
{
    DYNAMIC_SHARED(uint4, memory);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Strides strides = MAKE_STRIDES;
    const int s = blockIdx.z, head = blockIdx.y, stride = (int)strides.span;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float* weights = reinterpret_cast<float*>(memory);
    u8* marks = reinterpret_cast<u8*>(weights + here.pages);
    const i64 max_tiles = (call.max_pages + stride - 1) / stride;
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p);
    for (int h = 0; h < call.group() && !here.whole; h++) {
        for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) weights[p] = 0;
        for (int r = 0; r * stride < here.rows; r++) {
            const i64 row = strides.row(head * call.group() + h, here.place) + r;
            const u16* sums = at<u16>(strides.sums) + row * call.max_pages;
            const float* tops = at<float>(strides.tops) + row * max_tiles;
            float top = LOWEST, total = 0;
            for (int tile = threadIdx.x; tile * stride < here.pages; tile += CHOICE_THREADS) top = fmaxf(top, tops[tile]);
            top = block_max(room, top);
            for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) total += half_to_float(sums[p]) * exp2f(tops[p / stride] - top);
            const float factor = 1 / block_sums(room, total, 0).x;
            for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS)
                weights[p] += half_to_float(sums[p]) * exp2f(tops[p / stride] - top) * factor;
        }
        float before = 0, all = 0;
        for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) {
            all += weights[p];
            if (here.kept(choice, p)) before += weights[p], weights[p] = TAKEN;
        }
        const float2 known = block_sums(room, before, all);
        const float part = __int_as_float((int)tau);
        pick(room, weights, marks, here.pages, known.x, part < 1 ? part * known.y : infinity(), 0, here.pages);
    }
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
