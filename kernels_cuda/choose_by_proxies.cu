// Which pages a prompt's queries read, by how mean heads weigh them (ProxyAttn, arXiv 2509.24745; the reference is
// policies/prefill/proxy_attn.py). A proxy is the mean of some KV heads and of their query heads; where KV heads hold different numbers of
// tokens, each is one by itself. Of every stride-th query and key its softmax weights are computed, and pages ranked by the largest of a
// block's. How many pages a head reads is what its own last queries need (sampled_weights.cu). Products are of halves.
//   mean_queries     queries [kv_heads][query blocks of all sequences][64 / stride][head_dim] halves, of proxies.
//                    Grid (query blocks, kv_heads, sequences), block 128
//   mean_heads       keys [kv_heads][pages of all sequences][32 / stride][head_dim] halves. Grid (pages, kv_heads, sequences), block 128
//   score_proxies    tops [rows of queries][max_pages] float32, the largest score of a row and page; sums [rows][key tiles] float2, the
//                    largest of 64 keys and the sum of the exponentials less that one.
//                    Grid (tiles of 64 keys, kv_heads, sequences), block 128
//   proxy_totals     totals [rows] float32, log2 of a row's sum. Grid (eights of rows, kv_heads, sequences), block 256
//   count_pages      counts [sequences][num_heads] int32, pages that cover a part of a head's sampled weights.
//                    Grid (num_heads, sequences), block CHOICE_THREADS
//   choose_by_proxies  the lists. Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: 5 bytes a page
#include "page_tiles.cuh"
#include "prefill_choice.cuh"

#define TILE 64  // keys
#define PROXY_ARGS(X) X(queries) X(keys) X(tops) X(sums) X(totals) X(counts) X(page_sums) X(places) X(page_places) X(key_tiles) X(proxies) \
    X(stride) X(part) X(budget)
#define PROXY_PARAMETERS PROXY_ARGS(AS_PARAMETER) i64 unused
#define MAKE_PROXIES Proxies{PROXY_ARGS(AS_VALUE)}

// A proxy's KV heads.
struct Heads { int first, count; };

struct Proxies {
    PROXY_ARGS(AS_FIELD)

    __device__ __forceinline__ int rows() const { return QUERY_BLOCK / (int)stride; }  // of a block of queries
    __device__ __forceinline__ int columns() const { return PAGE / (int)stride; }      // of a page
    __device__ __forceinline__ int count(const Call& call, int s) const
    {
        bool alike = true;
        for (int head = 1; head < call.kv_heads; head++) alike &= call.slots(s, head) == call.slots(s, 0);
        return alike ? (int)min(proxies, call.kv_heads) : (int)call.kv_heads;
    }
    // The first ones have a KV head more where there are some left.
    __device__ __forceinline__ Heads heads(const Call& call, int proxy, int count) const
    {
        const int each = (int)call.kv_heads / count, more = (int)call.kv_heads % count;
        return {proxy * each + min(proxy, more), each + (proxy < more)};
    }
    __device__ __forceinline__ i64 row(const QueryBlock& start, int proxy) const { return (proxy * places + start.place) * rows(); }
    __device__ __forceinline__ i64 column(const QueryBlock& start, int proxy) const
    {
        return (proxy * page_places + start.page_place) * columns();
    }
};

KERNEL mean_queries(CALL_PARAMETERS CHOICE_PARAMETERS PROXY_PARAMETERS)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Proxies all = MAKE_PROXIES;
    const int s = blockIdx.z, proxy = blockIdx.y, depth = (int)call.head_dim, group = call.group(), per = all.rows();
    const QueryBlock here(call, choice, s, 0, blockIdx.x);
    if (!here.there) return;
    const int count = all.count(call, s);
    if (proxy >= count) return;
    const Heads own = all.heads(call, proxy, count);
    u16* to = at<u16>(queries) + (all.row(here, proxy)) * depth;
    const float factor = call.scale() * LOG2E / (own.count * group);
    for (int n = threadIdx.x; n < per * depth; n += blockDim.x) {
        const int row = call.first_row(s) + here.first + min(n / depth * (int)stride, here.rows - 1), c = n % depth;
        const i64 position = at<i64>(call.positions)[row];
        const float* q = at<float>(call.q) + row * call.q_stride + own.first * group * depth;
        float sum = 0;
#pragma unroll 4
        for (int h = 0; h < own.count * group; h++) sum += rotated(call, q + h * depth, position, c);
        to[n] = float_to_half(sum * factor);
    }
}

KERNEL mean_heads(CALL_PARAMETERS CHOICE_PARAMETERS PROXY_PARAMETERS)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Proxies all = MAKE_PROXIES;
    const int s = blockIdx.z, proxy = blockIdx.y, page = blockIdx.x, depth = (int)call.head_dim, per = all.columns();
    const QueryBlock start(call, choice, s, 0, 0);
    if (!start.there) return;
    const int count = all.count(call, s);
    if (proxy >= count) return;
    const Heads own = all.heads(call, proxy, count);
    const int tokens = min(PAGE, call.slots(s, own.first) - page * PAGE);
    if (tokens <= 0) return;
    u16* to = at<u16>(keys) + (all.column(start, proxy) + page * per) * depth;
    for (int n = threadIdx.x; n < per * depth; n += blockDim.x) {
        const int i = n % per, c = n / per, t = i * (int)stride;
        float sum = 0;
        for (int h = 0; h < own.count && t < tokens; h++) {
            const int entry = call.table(s, own.first + h)[page];
            sum += entry < 0 ? 0 : key_at(Page(call.pools, entry), depth, c, t);
        }
        to[i * depth + c] = float_to_half(sum / own.count);
    }
}

template <int D> __device__ __forceinline__ void score_proxies(const Call& call, const Choice& choice, const Proxies& all)
{
    __shared__ uint4 memory[TILE * 2 * D / 16];
    __shared__ float scores[4][16][TILE + 1];
    wait_previous();
    const int s = blockIdx.z, proxy = blockIdx.y, begin = blockIdx.x * TILE, stride = (int)all.stride;
    if (s >= call.sequences()) return;
    const int count = all.count(call, s);
    if (proxy >= count) return;
    const QueryBlock start(call, choice, s, all.heads(call, proxy, count).first, 0);
    const int n = start.there ? call.rows(s) : 0, end = start.there ? start.past + n : 0;  // slots
    if (begin * stride >= end) return;
    u8* tile = reinterpret_cast<u8*>(memory);
    const u16* from = at<u16>(all.keys) + (all.column(start, proxy) + begin) * D;
    const int there = (end + stride - 1) / stride - begin;
    for (int i = threadIdx.x; i < TILE * D / 8; i += blockDim.x) {
        const int column = i / (D / 8);
        cp_async16_or_zeros(tile + value_piece<D>(column, i % (D / 8)), column < there ? from + 8 * i : from, column < there);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const int rows = (n + stride - 1) / stride, per = all.columns(), pages = TILE / per;
    const i64 first = all.row(start, proxy);
    for (int row0 = 16 * warp; row0 < rows; row0 += 64) {
        if (start.past + min(row0 + 15, rows - 1) * stride < begin * stride) continue;
        const u16* query = at<u16>(all.queries) + first * D + 2 * j;
        float score[TILE / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            u32 q[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                q[i] = *reinterpret_cast<const u32*>(query + min(row0 + g + 8 * (i % 2), rows - 1) * D + 16 * k + 8 * (i / 2));
#pragma unroll
            for (int m = 0; m < TILE / 8; m += 2) {
                u32 b[4];
                load_matrices(b, tile + value_piece<D>(8 * m + lane % 16, 2 * k + lane / 16));
                mma_f16(score[m], q, b[0], b[2]);
                mma_f16(score[m + 1], q, b[1], b[3]);
            }
        }
        float top[2] = {LOWEST, LOWEST}, sum[2] = {};
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) {
            const int r = i / 2 % 2, row = row0 + g + 8 * r, column = i / 4 * 8 + 2 * j + i % 2;
            float& x = score[i / 4][i % 4];
            if ((begin + column) * stride > start.past + row * stride) x = -infinity();
            scores[warp][g + 8 * r][column] = x;
            top[r] = fmaxf(top[r], x);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) top[r] = quad_max(top[r]);
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) sum[i / 2 % 2] += exp2f(score[i / 4][i % 4] - top[i / 2 % 2]);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] = quad_sum(sum[r]);
            const int row = row0 + g + 8 * r;
            if (j == 0 && row < rows) at<float2>(all.sums)[(first + row) * all.key_tiles + blockIdx.x] = make_float2(top[r], sum[r]);
        }
        __syncwarp();
        for (int i = lane; i < 16 * pages; i += 32) {
            const int row = row0 + i % 16, page = begin / per + i / 16;
            float best = LOWEST;
            for (int c = 0; c < per; c++) best = fmaxf(best, scores[warp][i % 16][i / 16 * per + c]);
            if (row < rows && page < call.max_pages) at<float>(all.tops)[(first + row) * call.max_pages + page] = best;
        }
        __syncwarp();
    }
}

#define SCORE_KERNEL(D)                                                                                                                    \
    extern "C" __global__ void __launch_bounds__(128) score_proxies_##D(CALL_PARAMETERS CHOICE_PARAMETERS PROXY_PARAMETERS)                \
    {                                                                                                                                      \
        score_proxies<D>(MAKE_CALL, MAKE_CHOICE, MAKE_PROXIES);                                                                            \
    }
SCORE_KERNEL(64)
SCORE_KERNEL(128)

KERNEL proxy_totals(CALL_PARAMETERS CHOICE_PARAMETERS PROXY_PARAMETERS)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Proxies all = MAKE_PROXIES;
    const int s = blockIdx.z, proxy = blockIdx.y, row = blockIdx.x * 8 + threadIdx.x / 32;
    if (s >= call.sequences() || row * stride >= call.rows(s)) return;
    const int count = all.count(call, s);
    if (proxy >= count) return;
    const QueryBlock start(call, choice, s, all.heads(call, proxy, count).first, 0);
    if (!start.there) return;
    const float2* parts = at<float2>(sums) + (all.row(start, proxy) + row) * key_tiles;
    float top = LOWEST, sum = 0;
    for (int t = threadIdx.x % 32; t <= (start.past / (int)stride + row) / TILE; t += 32) {
        const float best = fmaxf(top, parts[t].x);
        sum = sum * exp2f(top - best) + parts[t].y * exp2f(parts[t].x - best), top = best;
    }
    const float best = warp_max(top);
    sum = warp_sum(sum * exp2f(top - best));
    if (threadIdx.x % 32 == 0) at<float>(totals)[all.row(start, proxy) + row] = best + log2f(fmaxf(sum, 1e-30f));
}

KERNEL count_pages(CALL_PARAMETERS CHOICE_PARAMETERS PROXY_PARAMETERS)
{
    __shared__ Totals room;
    __shared__ int found;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const int s = blockIdx.y, head = blockIdx.x, kv_head = head / call.group();
    const QueryBlock start(call, choice, s, kv_head, 0);
    if (!start.there) return;
    const int pages = (call.slots(s, kv_head) + PAGE - 1) / PAGE;
    const float *weights = at<float>(page_sums) + head * page_places + start.page_place, wanted = __int_as_float((int)part);
    if (threadIdx.x == 0) found = 0;
    float sum = 0;
    for (int p = threadIdx.x; p < pages; p += CHOICE_THREADS) sum += weights[p];
    sum = block_sums(room, sum, 0).x;
    pick(room, weights, [&](int) { atomicAdd(&found, 1); }, pages, 0, wanted < 1 ? wanted * sum : infinity(), 0, pages);
    __syncthreads();
    if (threadIdx.x == 0) at<int>(counts)[s * call.num_heads + head] = found;
}

KERNEL choose_by_proxies(CALL_PARAMETERS CHOICE_PARAMETERS PROXY_PARAMETERS)
{
    DYNAMIC_SHARED(float, memory);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Proxies all = MAKE_PROXIES;
    const int s = blockIdx.z, head = blockIdx.y;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    float* weights = memory;
    u8* marks = reinterpret_cast<u8*>(memory + here.pages);
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p);
    if (!here.whole) {
        const int proxy_count = all.count(call, s), pages = (call.slots(s, head) + PAGE - 1) / PAGE;
        int proxy = 0, covering = 0;
        while (all.heads(call, proxy, proxy_count).first + all.heads(call, proxy, proxy_count).count <= head) proxy++;
        for (int h = 0; h < call.group(); h++) covering = max(covering, at<int>(counts)[s * call.num_heads + head * call.group() + h]);
        const int count = max((int)ceil((double)covering / pages * here.pages), (int)budget);
        const i64 first = all.row(here, proxy);
        for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) {
            float best = 0;
            for (int r = 0; r * stride < here.rows; r++)
                if (p * PAGE <= here.past + here.first + r * stride)
                    best = fmaxf(best, exp2f(at<float>(tops)[(first + r) * call.max_pages + p] - at<float>(totals)[first + r]));
            weights[p] = best;
        }
        __syncthreads();
        pick(room, weights, marks, here.pages, 0, 0, count, count);
    }
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
