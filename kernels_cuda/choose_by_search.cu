// Which pages a prompt's queries read, found by halving ranges of pages (HiP, arXiv 2406.09827, 2502.08910; the reference is
// policies/prefill/hip.py). A range is scored by one key in its middle, a page in the end by several: the largest product with some of a
// block's queries. Products are of halves, so keys that may be asked for are copied first: of each page tokens 0 and 16, where middles lie,
// and every step-th.
//   copy_keys         keys [pages of all sequences][kv_heads][2 + those][width] halves, width: channels, up to a multiple of 32 with zeros;
//                     maps, zeros. Grid (pages, kv_heads, sequences), block 128
//   search_pages      maps [kv_heads][query blocks of all sequences][max_pages / 32] words: bit p % 32 of word p / 32, page p is read.
//                     Grid (query blocks, num_heads, sequences), block CHOICE_THREADS, shared: queries as halves, 9 bytes a range
//   choose_by_search  the lists. Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: a byte a page
#include "page_values.cuh"
#include "prefill_means.cuh"

#define MIDDLES 2  // keys of a page that may be in the middle of a range
#define SEARCH_ARGS(X) X(keys) X(maps) X(places) X(ranges) X(keep) X(beam) X(stride) X(step)
#define SEARCH_PARAMETERS SEARCH_ARGS(AS_PARAMETER) i64 unused
#define MAKE_SEARCH Search{SEARCH_ARGS(AS_VALUE)}

// ranges: that there is room for
struct Search {
    SEARCH_ARGS(AS_FIELD)

    __device__ __forceinline__ int of_page() const { return (PAGE - (int)step / 2 + (int)step - 1) / (int)step; }  // keys of the last round
    __device__ __forceinline__ u32* words(const Call& call, int head, int place) const
    {
        return at<u32>(maps) + (head * places + place) * ((call.max_pages + 31) / 32);
    }
};

__device__ __forceinline__ int width_of(int depth) { return (depth + 31) / 32 * 32; }

KERNEL copy_keys(CALL_PARAMETERS CHOICE_PARAMETERS SEARCH_PARAMETERS)
{
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Search search = MAKE_SEARCH;
    const int s = blockIdx.z, head = blockIdx.y, page = blockIdx.x, depth = (int)call.head_dim, width = width_of(depth);
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const int all = ((int)call.max_pages + 31) / 32, tokens = min(PAGE, call.slots(s, head) - page * PAGE);
    for (int block = page; block < start.blocks; block += gridDim.x)
        for (int w = threadIdx.x; w < all; w += blockDim.x) search.words(call, head, start.place + block)[w] = 0;
    if (tokens <= 0) return;
    const int per = MIDDLES + search.of_page(), entry = call.table(s, head)[page];
    u16* to = at<u16>(keys) + ((start.page_place + page) * call.kv_heads + head) * per * width;
    for (int n = threadIdx.x; n < per * width; n += blockDim.x) {
        const int i = n % per, c = n / per, t = i < MIDDLES ? PAGE / 2 * i : (int)step / 2 + (i - MIDDLES) * (int)step;
        const bool there = entry >= 0 && c < depth && t < tokens;
        to[i * width + c] = there ? float_to_half(key_at(Page(call.pools, entry), depth, c, t)) : (u16)0;
    }
}

// Scores of `count` ranges, in an order that pick() takes: of queries [tiles of 16][stride of a row] in shared memory with `each` keys that
// key(range, i) points to. Neighbouring channels are taken 8 at a time, of queries and keys in the same order. By warps, 16 ranges each.
template <typename Key>
__device__ __forceinline__ void score_ranges(const u16* queries, int tiles, int width, int count, int each, const Key& key, float* scores)
{
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4, row = width + 8;
    for (int first = 16 * warp; first < count; first += 16 * CHOICE_WARPS) {
        float best[2][2] = {{LOWEST, LOWEST}, {LOWEST, LOWEST}};
        for (int i = 0; i < each; i++) {
            const u16* own[2];
#pragma unroll
            for (int n = 0; n < 2; n++) own[n] = key(min(first + 8 * n + g, count - 1), i) + 8 * j;
            for (int tile = 0; tile < tiles; tile++) {
                float score[2][4] = {};
                const u16* query = queries + (16 * tile + g) * row + 8 * j;
#pragma unroll 4
                for (int c = 0; c < width; c += 32) {
                    const uint4 x = *reinterpret_cast<const uint4*>(query + c), y = *reinterpret_cast<const uint4*>(query + 8 * row + c);
                    const u32 low[4] = {x.x, y.x, x.y, y.y}, high[4] = {x.z, y.z, x.w, y.w};
#pragma unroll
                    for (int n = 0; n < 2; n++) {
                        const uint4 k = *reinterpret_cast<const uint4*>(own[n] + c);
                        mma_f16(score[n], low, k.x, k.y);
                        mma_f16(score[n], high, k.z, k.w);
                    }
                }
#pragma unroll
                for (int m = 0; m < 8; m++) best[m / 4][m % 2] = fmaxf(best[m / 4][m % 2], score[m / 4][m % 4]);
            }
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
            float x = best[m / 2][m % 2];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, lanes));
            const int range = first + m / 2 * 8 + 2 * j + m % 2;
            if (g == 0 && range < count) scores[range] = ordered(x);
        }
    }
    __syncthreads();
}

KERNEL search_pages(CALL_PARAMETERS CHOICE_PARAMETERS SEARCH_PARAMETERS)
{
    DYNAMIC_SHARED(uint4, memory);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Search search = MAKE_SEARCH;
    const int s = blockIdx.z, head = blockIdx.y, kv_head = head / call.group(), depth = (int)call.head_dim, width = width_of(depth);
    const QueryBlock here(call, choice, s, kv_head, blockIdx.x);
    if (!here.there || here.whole) return;
    const int rows = (QUERY_BLOCK + (int)stride - 1) / (int)stride, tiles = (rows + 15) / 16;
    u16* queries = reinterpret_cast<u16*>(memory);
    int* firsts = reinterpret_cast<int*>(queries + 16 * tiles * (width + 8));  // of the ranges, their first page
    float* scores = reinterpret_cast<float*>(firsts + ranges);
    u8* flags = reinterpret_cast<u8*>(scores + ranges);
    for (int n = threadIdx.x; n < 16 * tiles * width; n += CHOICE_THREADS) {
        const int c = n % width, row = call.first_row(s) + here.first + min(min(n / width, rows - 1) * (int)stride, here.rows - 1);
        const float* q = at<float>(call.q) + row * call.q_stride + head * depth;
        queries[n / width * (width + 8) + c] = c < depth ? float_to_half(rotated(call, q, at<i64>(call.positions)[row], c)) : (u16)0;
    }
    const int limit = (here.past + here.first) / PAGE, all = (call.slots(s, kv_head) + PAGE - 1) / PAGE, of_page = search.of_page();
    const i64 row = (MIDDLES + of_page) * width;  // of a page's keys
    const u16* own = at<u16>(keys) + (here.page_place * call.kv_heads + kv_head) * row;
    const auto page_keys = [&](int page) { return own + page * call.kv_heads * row; };
    int size = 1;
    while (size * beam < all) size *= 2;
    int count = (limit + size - 1) / size;
    for (int i = threadIdx.x; i < count; i += CHOICE_THREADS) firsts[i] = i * size;
    __syncthreads();
    const auto keep_best = [&](int most) {  // of the ranges, in their order
        for (int i = threadIdx.x; i < count; i += CHOICE_THREADS) flags[i] = 0;
        __syncthreads();
        pick(room, scores, flags, count, 0, 0, most, most);
        int found = 0;
        for (int from = 0; from < count; from += CHOICE_THREADS) {
            const int i = from + threadIdx.x, first = i < count ? firsts[i] : 0;
            const bool mine = i < count && flags[i];
            int some;
            const int rank = found + block_rank(room, mine, some);
            if (mine) firsts[rank] = first;  // all have been read that far
            found += some;
        }
        count = found;
        __syncthreads();
    };
    while (size > 1) {
        size /= 2;
        const int before = count;
        for (int from = 0; from < before; from += CHOICE_THREADS) {
            const int i = from + threadIdx.x, second = i < before ? firsts[i] + size : limit;
            int some;
            const int rank = count + block_rank(room, second < limit, some);
            if (second < limit) firsts[rank] = second;
            count += some;
        }
        __syncthreads();
        if (count <= beam) continue;
        const auto middle = [&](int i, int) {
            const int twice = firsts[i] + min(firsts[i] + size, limit);
            return page_keys(twice / 2) + twice % 2 * width;
        };
        score_ranges(queries, tiles, width, count, 1, middle, scores);
        keep_best((int)beam);
    }
    if (count > keep) {
        const auto some_key = [&](int i, int n) { return page_keys(firsts[i]) + (MIDDLES + n) * width; };
        score_ranges(queries, tiles, width, count, of_page, some_key, scores);
        keep_best((int)keep);
    }
    u32* to = search.words(call, kv_head, here.place);
    for (int i = threadIdx.x; i < count; i += CHOICE_THREADS) atomicOr(to + firsts[i] / 32, 1u << firsts[i] % 32);
}

KERNEL choose_by_search(CALL_PARAMETERS CHOICE_PARAMETERS SEARCH_PARAMETERS)
{
    DYNAMIC_SHARED(u8, marks);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Search search = MAKE_SEARCH;
    const int s = blockIdx.z, head = blockIdx.y;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    const u32* found = search.words(call, head, here.place);
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p) || (found[p / 32] >> p % 32 & 1);
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks);
}
