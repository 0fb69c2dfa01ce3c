// True softmax weights of some queries of a prompt, by page and by band: of keys 32 neighbours, of distances too. Of each row and page sums
// of exponentials are kept, which is all that pages and bands are made of: products are computed once. Sums are made in one order, so that
// runs are alike. Where rows are many, pieces of `most_rows` from `from` on are weighed one after the other.
//   arrange_samples  arranged [kv_heads][query blocks of all sequences][tiles of 16 rows] halves, as the matrix unit takes them: rows of
//                    the query heads of a KV head, one head after the other; flags, zeros. Grid (tiles, kv_heads, sequences), block 256
//   score_samples    partials [kv_heads][pages of all sequences][most_rows] four halves: of a row and page the largest score, the sum of
//                    the exponentials less that one, and a BAND_PART of those whose key is as many bands back as pages, and one less.
//                    Grid (pairs of pages, kv_heads, sequences), block 128
//   sample_totals    totals [rows] float32, log2 of a row's sum. Grid (eights of rows, kv_heads, sequences), block 256
//   sample_sums      page_sums, band_sums [num_heads][pages of all sequences] float32. Grid (pages / 32, num_heads, sequences), block 256
#include "page_tiles.cuh"
#include "sampled_queries.cuh"

#define BAND_PART 0.0625f  // so that weights by how many samples reach a distance stay within halves
#define LEAST_TOP -60000.0f

KERNEL arrange_samples(CALL_PARAMETERS CHOICE_PARAMETERS SAMPLE_PARAMETERS i64 unused)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Samples samples = MAKE_SAMPLES;
    const int s = blockIdx.z, head = blockIdx.y, tile = blockIdx.x, depth = (int)call.head_dim;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int n = call.rows(s), count = samples.count(n), rows = call.group() * count;
    if (tile == 0)
        for (int p = threadIdx.x; p < (call.slots(s, head) + PAGE - 1) / PAGE; p += blockDim.x)
            at<u32>(samples.flags)[samples.page(start, head) + p] = 0;
    if (tile * 16 >= rows) return;
    u32* to = at<u32>(samples.arranged) + (samples.tile(call, start, s, head) + tile) * 8 * depth;
    for (int word = threadIdx.x; word < 8 * depth; word += blockDim.x) {
        const int i = word % 4, lane = word / 4 % 32, c = word / 128 * 16 + 8 * (i / 2) + 2 * (lane % 4);
        const int u = min(tile * 16 + lane / 4 + 8 * (i % 2), rows - 1), row = call.first_row(s) + max(0, samples.token(u % count, n));
        const float* query = at<float>(call.q) + row * call.q_stride + (head * call.group() + u / count) * depth;
        const i64 position = at<i64>(call.positions)[row];
        const float factor = call.scale() * LOG2E;
        to[word] = floats_to_halves(rotated(call, query, position, c) * factor, rotated(call, query, position, c + 1) * factor);
    }
}

template <int D> __device__ __forceinline__ void score_samples(const Call& call, const Choice& choice, const Samples& samples, int from)
{
    __shared__ uint4 memory[2 * D * 64 / 16];
    u8* keys = reinterpret_cast<u8*>(memory);
    wait_previous();
    const int s = blockIdx.z, head = blockIdx.y, begin = blockIdx.x * 2 * PAGE;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int slots = call.slots(s, head), pages = (slots + PAGE - 1) / PAGE;
    if (begin >= slots || from >= call.group() * samples.count(call.rows(s))) return;  // no keys, or no rows of this piece
    bool there[2];
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const int page = begin / PAGE + part, entry = page < pages ? call.table(s, head)[page] : -1;
        there[part] = entry >= 0;
        if (there[part]) fetch_keys<D>(Page(call.pools, entry), keys + part * D * 64);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    const int n = call.rows(s), count = samples.count(n), rows = call.group() * count;
    const bool edge = samples.segment && begin < n;  // some keys are farther back than some samples reach
    const Reach reach(samples, n);
    const int end = min(rows, from + (int)samples.most_rows);
    const i64 first_tile = samples.tile(call, start, s, head);
    for (int tile = from / 16 + warp; tile * 16 < end; tile += 4) {
        int place[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int u = tile * 16 + g + 8 * r, token = u < rows ? samples.token(u % count, n) : -1;
            place[r] = token < 0 ? -1 : start.past + token;
        }
        if (!__any_sync(FULL_WARP, max(place[0], place[1]) >= begin)) continue;
        const uint4* query = at<uint4>(samples.arranged) + (first_tile + tile) * 2 * D + lane;
        float score[8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const uint4 x = query[k * 32];
            const u32 q[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int m = 0; m < 8; m += 2) {
                u32 b[4];
                load_matrices_transposed(b, keys + m / 4 * D * 64 + key_piece<D>(16 * k + lane % 16, m % 4 + lane / 16));
                mma_f16(score[m], q, b[0], b[1]);
                mma_f16(score[m + 1], q, b[2], b[3]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int part = 0; part < 2; part++) {
                float top = LEAST_TOP, sum = 0, low = 0, high = 0;
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float& x = score[4 * part + i / 2][2 * r + i % 2];
                    if (!there[part] || begin + part * PAGE + 8 * (i / 2) + 2 * j + i % 2 > place[r]) x = -infinity();
                    top = fmaxf(top, x);
                }
                top = half_to_float(float_to_half(quad_max(top)));
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float& x = score[4 * part + i / 2][2 * r + i % 2];
                    x = exp2_fast(x - top), sum += x;
                }
                const int token = place[r] - start.past - begin - part * PAGE;  // before which queries do not reach as far as to the page
#pragma unroll
                for (int i = 0; i < 8 && edge; i++)
                    score[4 * part + i / 2][2 * r + i % 2] *= reach.share(max(0, token - 8 * (i / 2) - 2 * j - i % 2));
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const bool near = 8 * (i / 2) + 2 * j + i % 2 <= place[r] % PAGE;
                    const float x = score[4 * part + i / 2][2 * r + i % 2];
                    low += near ? x : 0, high += near ? 0 : x;
                }
                sum = quad_sum(sum), low = quad_sum(low) * BAND_PART, high = quad_sum(high) * BAND_PART;
                const int page = begin / PAGE + part, u = tile * 16 + g + 8 * r;
                if (j == 0 && u < rows && page < pages)
                    samples.row(start, head, u - from, pages)[page] = make_uint2(floats_to_halves(top, sum), floats_to_halves(low, high));
            }
    }
}

#define SCORE_KERNEL(D)                                                                                                                \
    extern "C" __global__ void __launch_bounds__(128) score_samples_##D(CALL_PARAMETERS CHOICE_PARAMETERS SAMPLE_PARAMETERS i64 from)  \
    {                                                                                                                                  \
        score_samples<D>(MAKE_CALL, MAKE_CHOICE, MAKE_SAMPLES, (int)from);                                                             \
    }
SCORE_KERNEL(64)
SCORE_KERNEL(128)

KERNEL sample_totals(CALL_PARAMETERS CHOICE_PARAMETERS SAMPLE_PARAMETERS i64 from)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Samples samples = MAKE_SAMPLES;
    const int s = blockIdx.z, head = blockIdx.y, row = (int)from + blockIdx.x * 8 + threadIdx.x / 32;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int n = call.rows(s), count = samples.count(n), token = samples.token(row % count, n);
    if (row >= call.group() * count || token < 0) return;
    const uint2* parts = samples.row(start, head, row - (int)from, (call.slots(s, head) + PAGE - 1) / PAGE);
    float top = LEAST_TOP, sum = 0;
#pragma unroll 4
    for (int p = threadIdx.x % 32; p <= (start.past + token) / PAGE; p += 32) {
        const float2 part = halves_to_floats(parts[p].x);
        const float best = fmaxf(top, part.x);
        sum = sum * exp2f(top - best) + part.y * exp2f(part.x - best), top = best;
    }
    const float best = warp_max(top);
    sum = warp_sum(sum * exp2f(top - best));
    if (threadIdx.x % 32 == 0) at<float>(samples.totals)[samples.tile(call, start, s, head) * 16 + row] = best + log2f(fmaxf(sum, 1e-30f));
}

KERNEL sample_sums(CALL_PARAMETERS CHOICE_PARAMETERS SAMPLE_PARAMETERS i64 from)
{
    __shared__ float2 room[8][32];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Samples samples = MAKE_SAMPLES;
    const int s = blockIdx.z, head = blockIdx.y, kv_head = head / call.group(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const QueryBlock start(call, choice, s, kv_head, 0);
    if (!start.there) return;
    const int pages = (call.slots(s, kv_head) + PAGE - 1) / PAGE, p = blockIdx.x * 32 + lane;
    if (blockIdx.x * 32 >= pages) return;
    const int n = call.rows(s), count = samples.count(n), first = head % call.group() * count - (int)from;  // of the piece
    const int begin = max(0, -first), end = min(count, (int)samples.most_rows - first);
    const float* sums = at<float>(samples.totals) + samples.tile(call, start, s, kv_head) * 16 + from + first;
    float by_key = 0, by_distance = 0;
#pragma unroll 2
    for (int i = begin + warp; i < end; i += 8) {
        const int token = samples.token(i, n), own = (start.past + token) / PAGE;  // page
        if (token < 0) continue;
        const uint2* parts = samples.row(start, kv_head, first + i, pages);
        const float total = sums[i];
        if (p > own) continue;
        const float2 here = halves_to_floats(parts[p].x);
        by_key += here.y * exp2f(here.x - total);
        const uint2 near = parts[own - p];
        by_distance += half_to_float(near.y & 0xffff) * exp2f(half_to_float(near.x & 0xffff) - total);
        if (p == own) continue;
        const uint2 far = parts[own - p - 1];
        by_distance += half_to_float(far.y >> 16) * exp2f(half_to_float(far.x & 0xffff) - total);
    }
    room[warp][lane] = make_float2(by_key, by_distance);
    __syncthreads();
    if (warp || p >= pages) return;
    for (int w = 1; w < 8; w++) by_key += room[w][lane].x, by_distance += room[w][lane].y;
    const i64 to = samples.page(start, head) + p;
    at<float>(samples.page_sums)[to] = by_key + (from ? at<float>(samples.page_sums)[to] : 0);
    at<float>(samples.band_sums)[to] = by_distance + (from ? at<float>(samples.band_sums)[to] : 0);
}
