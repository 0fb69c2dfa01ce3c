// How much attention cached tokens receive, which eviction policies ask for: what kernels_cpu/attention_mass.py does, in float32 over pages
// of any format. The last rows of each sequence (probes) are scored once more against all slots of a KV head; their softmax weights, summed
// over the group's query heads, go to the sequence's mass: float [planes][layers][kv_heads][slots]. Bits of mass_mode tell which planes
// there are: SUM two, the mass of all probes since a token came and how many could see it; LAST one, of the newest call's probes alone.
// A weight needs its row's sum, so there are three kernels:
//   mass_queries  rotates the probes' queries, TILE of them side by side. grid (kv_heads, probes, sequences)
//   mass_tops     of each query the largest score and the sum of weights in a range of pages; the last range to end merges them
//   mass_add      scores again, and adds the weights. A slot belongs to one thread, so the order of sums is fixed
//                 grid of both (kv_heads * ranges, sequences): a block takes a range page by page, a lane is a token, warps have queries
#include "attention_merge.cuh"
#include "page_values.cuh"

#define MOST_DEPTH 256
#define TILE 8
#define WARPS 8
#define MASS_ARGS(X) X(mass) X(mass_mode) X(mass_plane) X(probes_index) X(ranges)

enum Mode { SUM = 1, LAST = 2 };

// The probes of a sequence and KV head. A query has the number row * group + head of the group, in the whole batch.
struct Probes {
    Call call;
    MASS_ARGS(AS_FIELD)
    i64 tiles;
    int s, head, slots, row, count, first, end, slot;  // row and slot of the first probe; queries first ... end
    int range, used, page, end_page;                   // which range of pages a block has, of how many; its pages, page ... end_page

    __device__ __forceinline__ void of(int sequence, int kv_head)
    {
        s = sequence, head = kv_head, slots = call.slots(s, head);
        count = min(call.rows(s), (int)at<i64>(call.state)[probes_index]);
        row = call.first_row(s) + call.rows(s) - count, slot = slots - count;
        first = row * call.group(), end = first + count * call.group();
    }
    // What a block of a grid (kv_heads * ranges, sequences) has to do; false: nothing.
    __device__ __forceinline__ bool take_range()
    {
        if ((int)blockIdx.y >= call.sequences()) return false;
        of(blockIdx.y, blockIdx.x % (int)call.kv_heads);
        if (count == 0) return false;
        const int pages = (slots + PAGE - 1) / PAGE, size = (pages + (int)ranges - 1) / (int)ranges;
        range = blockIdx.x / (int)call.kv_heads, used = (pages + size - 1) / size;
        page = range * size, end_page = min(pages, page + size);
        return range < used;
    }
    // Of a tile, [head_dim][TILE].
    __device__ __forceinline__ float* queries(int tile) const
    {
        return at<float>(call.workspace) + (head * tiles + tile) * call.head_dim * TILE;
    }
    // Largest score and sum of weights in a range; in `ranges` of all of them, with the sum's inverse.
    __device__ __forceinline__ float2* kept(int range) const
    {
        float* behind = at<float>(call.workspace) + call.kv_heads * tiles * call.head_dim * TILE;
        return reinterpret_cast<float2*>(behind) + (head * (ranges + 1) + range) * tiles * TILE;
    }
    __device__ __forceinline__ bool sees(int query, int column) const
    {
        const int own = slot + query / call.group() - row;
        return query >= first && query < end && column <= own && column >= call.first_visible(own);
    }
    // How many probes see a slot.
    __device__ __forceinline__ int seeing(int column) const
    {
        const int newest = slots - 1, last = call.window > 0 ? min(newest, column + (int)call.window - 1) : newest;
        return max(0, last - max(column, slot) + 1);
    }
    // Whether some probe sees a page that is there; then its keys [head_dim][PAGE] are in shared memory. By the whole block.
    __device__ __forceinline__ bool fetch(int number, float* keys) const
    {
        const int entry = call.table(s, head)[number], depth = (int)call.head_dim;
        if (entry < 0 || number * PAGE + PAGE <= call.first_visible(slot)) return false;
        const Page page(call.pools, entry);
        for (int n = threadIdx.x; n < depth * PAGE; n += 32 * WARPS) keys[n] = key_at(page, depth, n / PAGE, n % PAGE);
        __syncthreads();
        return true;
    }
    // Scores of this lane's token; of queries that are no probes anything.
    __device__ __forceinline__ void score(int tile, const float* keys, float (&found)[TILE]) const
    {
        const float4* q = reinterpret_cast<const float4*>(queries(tile));
#pragma unroll
        for (int i = 0; i < TILE; i++) found[i] = 0;
        for (int c = 0; c < call.head_dim; c++) {
            const float4 a = q[2 * c], b = q[2 * c + 1];
            const float x = keys[c * PAGE + threadIdx.x % 32], eight[TILE] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int i = 0; i < TILE; i++) found[i] = fmaf(eight[i], x, found[i]);
        }
    }
};

#define PROBING(name, threads) \
    KERNEL __launch_bounds__(threads, 2) name(CALL_PARAMETERS MASS_ARGS(AS_PARAMETER) i64 tiles)
#define MAKE_PROBES Probes{MAKE_CALL, MASS_ARGS(AS_VALUE) tiles}

PROBING(mass_queries, 128)
{
    __shared__ float turned[HEADS * MOST_DEPTH];
    wait_previous();
    Probes probes = MAKE_PROBES;
    const Call& call = probes.call;
    if ((int)blockIdx.z >= call.sequences()) return;
    probes.of(blockIdx.z, blockIdx.x);
    if ((int)blockIdx.y >= probes.count) return;
    const int row = probes.row + blockIdx.y, depth = (int)call.head_dim, group = call.group();
    for (int first = 0; first < group; first += HEADS) {
        const int heads = min(HEADS, group - first);
        const float* x = at<float>(call.q) + row * call.q_stride + (probes.head * group + first) * depth;
        for (int n = threadIdx.x; n < heads * depth; n += 128)
            turned[n / depth * MOST_DEPTH + n % depth] = rotated(call, x + n / depth * depth, at<i64>(call.positions)[row], n % depth)
                                                         * call.scale() * LOG2E;
        if (call.keys_rotated) hadamard(turned, heads, depth, MOST_DEPTH);
        __syncthreads();
        for (int n = threadIdx.x; n < heads * depth; n += 128) {
            const int query = row * group + first + n / depth;
            probes.queries(query / TILE)[n % depth * TILE + query % TILE] = turned[n / depth * MOST_DEPTH + n % depth];
        }
        __syncthreads();
    }
}

PROBING(mass_tops, 32 * WARPS)
{
    DYNAMIC_SHARED(float, keys);
    wait_previous();
    Probes probes = MAKE_PROBES;
    const Call& call = probes.call;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (!probes.take_range()) return;
    const int used = probes.used;
    float2* kept = probes.kept(probes.range);
    for (int i = probes.first + threadIdx.x; i < probes.end; i += 32 * WARPS) kept[i] = make_float2(LOWEST, 0);
    __syncthreads();
    for (int page = probes.page; page < probes.end_page; page++) {
        if (!probes.fetch(page, keys)) continue;
        for (int tile = probes.first / TILE + warp; tile * TILE < probes.end; tile += WARPS) {
            float score[TILE], top = LOWEST, sum = 0;
            probes.score(tile, keys, score);
#pragma unroll
            for (int i = 0; i < TILE; i++) {
                const bool seen = probes.sees(tile * TILE + i, page * PAGE + lane);
                const float best = warp_max(seen ? score[i] : LOWEST), total = warp_sum(seen ? exp2_fast(score[i] - best) : 0);
                if (lane == i) top = best, sum = total;
            }
            const int query = tile * TILE + lane;
            if (lane < TILE && query >= probes.first && query < probes.end) {
                const float2 old = kept[query];
                const float best = fmaxf(old.x, top);
                kept[query] = make_float2(best, old.y * exp2_fast(old.x - best) + sum * exp2_fast(top - best));
            }
        }
        __syncthreads();
    }
    if (!last_to_arrive(blockIdx.y * (int)call.kv_heads + probes.head, used)) return;
    for (int i = probes.first + threadIdx.x; i < probes.end; i += 32 * WARPS) {
        float best = LOWEST, sum = 0;
        for (int r = 0; r < used; r++) best = fmaxf(best, load_shared_by_all(&probes.kept(r)[i].x));
        for (int r = 0; r < used; r++)
            sum += load_shared_by_all(&probes.kept(r)[i].y) * exp2_fast(load_shared_by_all(&probes.kept(r)[i].x) - best);
        probes.kept((int)ranges)[i] = make_float2(best, sum > 0 ? 1 / sum : 0);
    }
}

PROBING(mass_add, 32 * WARPS)
{
    DYNAMIC_SHARED(float, keys);
    __shared__ float parts[WARPS][PAGE];
    wait_previous();
    Probes probes = MAKE_PROBES;
    const Call& call = probes.call;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (!probes.take_range()) return;
    const float2* kept = probes.kept((int)ranges);
    float* own = at<float>(at<i64>(mass)[blockIdx.y]) + (call.layer * call.kv_heads + probes.head) * call.max_pages * PAGE;
    for (int page = probes.page; page < probes.end_page; page++) {
        const int slot = page * PAGE + lane;
        float total = 0;
        if (probes.fetch(page, keys))
            for (int tile = probes.first / TILE + warp; tile * TILE < probes.end; tile += WARPS) {
                float score[TILE];
                probes.score(tile, keys, score);
                const int query = tile * TILE + lane % TILE;
                const float2 about = query >= probes.first && query < probes.end ? kept[query] : make_float2(0, 0);
#pragma unroll
                for (int i = 0; i < TILE; i++) {
                    const float top = __shfl_sync(FULL_WARP, about.x, i), inverse = __shfl_sync(FULL_WARP, about.y, i);
                    total += probes.sees(tile * TILE + i, slot) ? exp2_fast(score[i] - top) * inverse : 0;
                }
            }
        parts[warp][lane] = total;
        __syncthreads();
        if (warp == 0 && slot < probes.slots) {
            total = 0;
            for (int w = 0; w < WARPS; w++) total += parts[w][lane];
            if (mass_mode & SUM) own[slot] += total, own[mass_plane + slot] += probes.seeing(slot);
            if (mass_mode & LAST) own[(mass_mode & SUM ? 2 * mass_plane : 0) + slot] = total;
        }
        __syncthreads();
    }
}
