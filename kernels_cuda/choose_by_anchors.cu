// Which pages and single keys a prompt's queries read, by how near scores come to an anchor (AnchorAttention, arXiv 2505.23520; the
// reference is policies/prefill/anchor.py). `step` blocks of queries are a superblock: they read the first pages, those from a few before
// its own on, and of the keys between, all alike, those whose score with the mean query of one of its blocks, for some query head, passes
// the block's limit. Scores are products of halves, and powers of 2.
//   anchor_blocks     limits [kv_heads][superblocks][rows] float32: mean of the queries' largest scores, less theta; means [kv_heads]
//                     [superblocks][tiles of 16 rows] halves, as the matrix unit takes them. A row is a query head of a block, one block
//                     after the other.  Grid (query blocks, num_heads, sequences), block 128: a warp has 16 queries
//   near_keys         words [kv_heads][superblocks][max_pages]: bit t of page p is key 32 * p + t, of pages between.
//                     Grid (pairs of pages, kv_heads, sequences), block 128: a warp has 16 keys
//   choose_by_anchors the lists. Grid (query blocks, kv_heads, sequences), block CHOICE_THREADS, shared: a byte a page
#include "page_tiles.cuh"
#include "prefill_choice.cuh"

#define TILE 64  // keys that are multiplied between two barriers
#define ANCHOR_ARGS(X) X(limits) X(means) X(words) X(superblocks) X(tiles) X(step) X(theta)
#define ANCHOR_PARAMETERS ANCHOR_ARGS(AS_PARAMETER) i64 unused
#define MAKE_ANCHORS Anchors{ANCHOR_ARGS(AS_VALUE)}

// superblocks, of `step` query blocks: as many as a call may have; tiles: of 16 rows, in each
struct Anchors {
    ANCHOR_ARGS(AS_FIELD)

    __device__ __forceinline__ int count(int blocks) const { return (blocks + (int)step - 1) / (int)step; }
    // The place of a sequence's first superblock for a KV head.
    __device__ __forceinline__ i64 first(const Call& call, int s, int head) const
    {
        int before = 0;
        for (int i = 0; i < s; i++)
            before += at<i64>(call.prefill_lists)[i] ? count((call.rows(i) + QUERY_BLOCK - 1) / QUERY_BLOCK) : 0;
        return head * superblocks + before;
    }
    // The page from which on a superblock reads all of them.
    __device__ __forceinline__ int start(const Choice& choice, int past, int superblock) const
    {
        return max(0, (past + superblock * (int)step * QUERY_BLOCK) / PAGE - (int)choice.recent);
    }
};

// Keys of two pages, below 0 of none, on their way; -> bit i: page i is there.
template <int D> __device__ __forceinline__ int fetch_pair(const Call& call, const int* table, int first, int second, u8* to)
{
    int there = 0;
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const int page = part ? second : first, entry = page < 0 ? -1 : table[page];
        if (entry < 0) continue;
        fetch_keys<D>(Page(call.pools, entry), to + part * D * 64);
        there |= 1 << part;
    }
    cp_async_commit();
    return there;
}

// A block's queries as halves [row][channel], and their mean as a row of a tile. room: of 128 threads.
template <int D> __device__ __forceinline__ void arrange_block(const Call& call, const QueryBlock& here, int s, int head, u8* queries,
                                                               float (&room)[128], u16* tile, int row)
{
    constexpr int SIDE = 128 / D;  // rows at a time
    const int c = threadIdx.x % D, side = threadIdx.x / D, first = call.first_row(s) + here.first;
    float sum = 0;
#pragma unroll 4
    for (int r = side; r < QUERY_BLOCK; r += SIDE) {
        const int own = first + min(r, here.rows - 1);
        const float* q = at<float>(call.q) + own * call.q_stride + head * D;
        const float x = rotated(call, q, at<i64>(call.positions)[own], c) * call.scale() * LOG2E;
        *reinterpret_cast<u16*>(queries + value_piece<D>(r, c / 8) + c % 8 * 2) = float_to_half(x);
        sum += r < here.rows ? x : 0;
    }
    room[threadIdx.x] = sum;
    __syncthreads();
    if (side) return;
    for (int i = 1; i < SIDE; i++) sum += room[i * D + c];
    const int word = (c / 16 * 32 + row % 8 * 4 + c % 8 / 2) * 4 + row / 8 + c % 16 / 8 * 2;
    tile[2 * word + c % 2] = float_to_half(sum / here.rows);
}

template <int D> __device__ __forceinline__ void anchor_blocks(const Call& call, const Choice& choice, const Anchors& anchors)
{
    constexpr int STAGE = TILE * 2 * D;  // bytes: of keys, or of a block's queries
    __shared__ uint4 memory[2 * STAGE / 16];
    __shared__ float room[128];
    wait_previous();
    const int s = blockIdx.z, head = blockIdx.y, block = blockIdx.x, group = call.group(), kv_head = head / group;
    const QueryBlock here(call, choice, s, kv_head, block);
    if (!here.there) return;
    const int superblock = block / (int)anchors.step, row = block % (int)anchors.step * group + head % group;
    const i64 place = (anchors.first(call, s, kv_head) + superblock) * anchors.tiles;
    u8* stages = reinterpret_cast<u8*>(memory);
    arrange_block<D>(call, here, s, head, stages + STAGE, room, at<u16>(anchors.means) + (place + row / 16) * 16 * D, row % 16);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4;
    u32 q[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; k++) load_matrices(q[k], stages + STAGE + value_piece<D>(16 * warp + lane % 16, 2 * k + lane / 16));
    // the first pages, and those from `start` on
    const int start = anchors.start(choice, here.past, superblock), sink = min((int)choice.sink, start), total = sink + here.pages - start;
    const auto page_at = [&](int i) { return i < sink ? i : i < total ? start + i - sink : -1; };
    const int* table = call.table(s, kv_head);
    float top[2] = {LOWEST, LOWEST};
    __syncthreads();  // queries have been read: keys may come in their place
    int there = fetch_pair<D>(call, table, page_at(0), page_at(1), stages);
    for (int pair = 0; 2 * pair < total; pair++) {
        const u8* keys = stages + pair % 2 * STAGE;
        const int coming = fetch_pair<D>(call, table, page_at(2 * pair + 2), page_at(2 * pair + 3), stages + (pair + 1) % 2 * STAGE);
        cp_async_wait<1>();
        __syncthreads();
        float score[TILE / 8][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++)
#pragma unroll
            for (int n = 0; n < TILE / 8; n += 2) {
                u32 b[4];
                load_matrices_transposed(b, keys + n / 4 * D * 64 + key_piece<D>(16 * k + lane % 16, n % 4 + lane / 16));
                mma_f16(score[n], q[k], b[0], b[1]);
                mma_f16(score[n + 1], q[k], b[2], b[3]);
            }
#pragma unroll
        for (int n = 0; n < TILE / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int own = here.past + here.first + 16 * warp + g + 8 * (i / 2);
                const int slot = page_at(2 * pair + n / 4) * PAGE + 8 * (n % 4) + 2 * j + i % 2;
                if (there >> n / 4 & 1 && slot <= own) top[i / 2] = fmaxf(top[i / 2], score[n][i]);
            }
        __syncthreads();
        there = coming;
    }
    float sum = 0;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = quad_max(top[r]);
        if (j == 0 && 16 * warp + g + 8 * r < here.rows) sum += top[r];
    }
    sum = warp_sum(sum);
    if (lane == 0) room[warp] = sum;
    __syncthreads();
    if (threadIdx.x) return;
    const float mean = (room[0] + room[1] + room[2] + room[3]) / here.rows;
    at<float>(anchors.limits)[place * 16 + row] = mean - __int_as_float((int)anchors.theta) * LOG2E;
}

template <int D> __device__ __forceinline__ void near_keys(const Call& call, const Choice& choice, const Anchors& anchors)
{
    __shared__ uint4 memory[2 * D * 64 / 16];
    wait_previous();
    const int s = blockIdx.z, head = blockIdx.y, first = 2 * blockIdx.x;
    const QueryBlock begin(call, choice, s, head, 0);
    if (!begin.there) return;
    const int count = anchors.count(begin.blocks), group = call.group();
    const int last = anchors.start(choice, begin.past, count - 1);  // behind the pages that some superblock has between
    if (first + 2 <= choice.sink || first >= last) return;
    u8* keys = reinterpret_cast<u8*>(memory);
    const int there = fetch_pair<D>(call, call.table(s, head), first, first + 1 < last ? first + 1 : -1, keys);
    cp_async_wait<0>();
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, j = lane % 4, part = warp / 2;
    u32 b[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        load_matrices_transposed(b[k], keys + part * D * 64 + key_piece<D>(16 * k + lane % 16, warp % 2 * 2 + lane / 16));
    const i64 place = anchors.first(call, s, head);
    for (int superblock = 0; superblock < count; superblock++) {
        if (first + part >= anchors.start(choice, begin.past, superblock)) continue;
        const int rows = min((int)anchors.step, begin.blocks - superblock * (int)anchors.step) * group;
        const i64 tile = (place + superblock) * anchors.tiles;
        bool near[4] = {};  // of columns 2 j, 2 j + 1, 8 + 2 j, 9 + 2 j
        for (int t = 0; 16 * t < rows; t++) {
            const uint4* query = at<uint4>(anchors.means) + (tile + t) * 2 * D + lane;
            float limit[2], score[2][4] = {};
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = 16 * t + g + 8 * r;
                limit[r] = row < rows ? at<float>(anchors.limits)[tile * 16 + row] : __int_as_float(0x7fc00000);  // no score reaches it
            }
#pragma unroll
            for (int k = 0; k < D / 16; k++) {
                const uint4 x = query[k * 32];
                const u32 q[4] = {x.x, x.y, x.z, x.w};
                mma_f16(score[0], q, b[k][0], b[k][1]);
                mma_f16(score[1], q, b[k][2], b[k][3]);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) near[i / 4 * 2 + i % 2] |= score[i / 4][i % 4] >= limit[i % 4 / 2];
        }
        u32 found = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) found |= (u32)(near[i] && there >> part & 1) << (i / 2 * 8 + 2 * j + i % 2);
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) found |= __shfl_xor_sync(FULL_WARP, found, lanes);
        if (lane == 0) at<u16>(anchors.words)[2 * ((place + superblock) * call.max_pages + first + part) + warp % 2] = (u16)found;
    }
}

#define ANCHOR_KERNEL(name, D)                                                                                                             \
    extern "C" __global__ void __launch_bounds__(128) name##_##D(CALL_PARAMETERS CHOICE_PARAMETERS ANCHOR_PARAMETERS)                      \
    {                                                                                                                                      \
        name<D>(MAKE_CALL, MAKE_CHOICE, MAKE_ANCHORS);                                                                                     \
    }
ANCHOR_KERNEL(anchor_blocks, 64)
ANCHOR_KERNEL(anchor_blocks, 128)
ANCHOR_KERNEL(near_keys, 64)
ANCHOR_KERNEL(near_keys, 128)

KERNEL choose_by_anchors(CALL_PARAMETERS CHOICE_PARAMETERS ANCHOR_PARAMETERS)
{
    DYNAMIC_SHARED(u8, marks);
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Anchors anchors = MAKE_ANCHORS;
    const int s = blockIdx.z, head = blockIdx.y, superblock = blockIdx.x / (int)step;
    const QueryBlock here(call, choice, s, head, blockIdx.x);
    if (!here.there) return;
    const int start = anchors.start(choice, here.past, superblock);
    for (int p = threadIdx.x; p < here.pages; p += CHOICE_THREADS) marks[p] = here.kept(choice, p) || p >= start;
    __syncthreads();
    write_list(call, choice, here, room, s, head, marks, at<u32>(words) + (anchors.first(call, s, head) + superblock) * call.max_pages);
}
