// Scores of pages by rows of an index (kernels_cpu/page_index.py says what is in them), those that are missing made first: a block scores a
// part of a KV head's pages, and makes their rows. select_pages notes up to where there are rows.
//   grid (kv_heads * parts, sequences), block 512 threads
//   representatives  of whole blocks: the mean of the keys least like the others, by the sum of the group's queries (InfLLM, 2402.04617)
//   landmarks        of whole blocks: the last key, by the best query (2305.16300)
//   components       keys along principal components, the page's best by the sum of the queries (Loki, 2406.02542)
//   collisions       tables of signatures that tokens share with a query, over those that share two at least (MagicPIG, 2410.16179)
#include "page_scores.cuh"

#define MOST_DEPTH 256
#define MOST_TABLES 256
#define BLOCK 4         // pages that a representative is for, at most
#define TELLING 4       // keys whose mean it is
#define CENTRE 1        // pages CENTRE ... CENTRE_END: their mean key is what signatures are centred by
#define CENTRE_END 5
#define AT_ONCE 8       // components that a key is multiplied with at once; bits of a table
#define FEWEST 2        // tables

struct alignas(16) Memory {
    float q[HEADS * MOST_DEPTH], each[WARPS][MOST_DEPTH];  // and what a warp, or the block, needs besides
};

// What a block has: pages begin ... end of a KV head, whole blocks of `each` pages; rows from page `missing` on are still to be made.
struct Own {
    int s, head, each, begin, end, missing;

    // False: nothing. q: the group's queries afterwards.
    __device__ __forceinline__ bool take(const Selection& a, int parts, Memory& shared)
    {
        const Call& call = a.call;
        s = blockIdx.y, head = blockIdx.x % (int)call.kv_heads, each = max(1, (int)a.block);
        if (!a.chooses(s, head)) return false;
        const int2 range = a.candidates(s, head, a.total(call.slots(s, head)));
        const int size = (max(range.y - range.x, 0) / each + parts - 1) / parts * each;
        const int part = blockIdx.x / (int)call.kv_heads, known = *a.indexed_of(s, head);
        begin = range.x + part * size, end = min(range.y, begin + size);
        if (begin >= end) return false;
        missing = max(begin, known / each * each);
        prepare_queries(call, s, head * call.group(), call.group(), shared.q);
        return true;
    }
    __device__ __forceinline__ int entry(const Call& call, int page) const { return call.table(s, head)[page]; }
};

__device__ __forceinline__ float dot(const float4& a, const float4& b) { return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, a.w * b.w))); }

// x [head_dim] in shared memory times y anywhere, by a warp.
__device__ __forceinline__ float product(const float* x, const float* y, int depth)
{
    float sum = 0;
    for (int c = threadIdx.x % 32; c < depth; c += 32) sum = fmaf(x[c], y[c], sum);
    return warp_sum(sum);
}

__device__ __forceinline__ float product_of_halves(const float* x, const u16* y, int depth)
{
    float sum = 0;
    for (int c = threadIdx.x % 32; c < depth; c += 32) sum = fmaf(x[c], half_to_float(y[c]), sum);  // a block's row may begin anywhere
    return warp_sum(sum);
}

// The sum of the group's queries in place of the first. A barrier after, which is also one for rows that are made before.
__device__ __forceinline__ void sum_queries(const Call& call, float* q)
{
    for (int c = threadIdx.x; c < call.head_dim; c += SELECT_THREADS)
        for (int h = 1; h < call.group(); h++) q[c] += q[h * call.head_dim + c];
    __syncthreads();
}

// By a warp, of the pages first ... first + pages: a lane has a token of each. direction: shared, [head_dim].
__device__ __forceinline__ void make_representative(const Call& call, const Own& own, int first, int pages, float* direction, u16* row)
{
    const int depth = (int)call.head_dim, lane = threadIdx.x % 32;
    float inverse[BLOCK] = {}, likeness[BLOCK] = {};
    auto keys = [&](int i, int quad) {
        const int entry = i < pages ? own.entry(call, first + i) : -1;
        return entry < 0 ? make_float4(0, 0, 0, 0) : four_keys(Page(call.pools, entry), depth, quad, lane);
    };
#pragma unroll 1
    for (int quad = 0; quad < depth / 4; quad++)
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            const float4 k = keys(i, quad);
            inverse[i] += dot(k, k);
        }
#pragma unroll
    for (int i = 0; i < BLOCK; i++) inverse[i] = 1 / fmaxf(sqrtf(inverse[i]), 1e-30f);
#pragma unroll 1
    for (int quad = 0; quad < depth / 4; quad++) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            const float4 k = keys(i, quad);
            sum.x = fmaf(k.x, inverse[i], sum.x), sum.y = fmaf(k.y, inverse[i], sum.y);
            sum.z = fmaf(k.z, inverse[i], sum.z), sum.w = fmaf(k.w, inverse[i], sum.w);
        }
        sum = make_float4(warp_sum(sum.x), warp_sum(sum.y), warp_sum(sum.z), warp_sum(sum.w));
        if (lane == 0) *reinterpret_cast<float4*>(direction + 4 * quad) = sum;
    }
    __syncwarp();
#pragma unroll 1
    for (int quad = 0; quad < depth / 4; quad++)
#pragma unroll
        for (int i = 0; i < BLOCK; i++)
            likeness[i] += dot(keys(i, quad), *reinterpret_cast<const float4*>(direction + 4 * quad)) * inverse[i];
    int chosen[TELLING];
    u32 taken = 0;  // of this lane's tokens
#pragma unroll
    for (int n = 0; n < TELLING; n++) {
        u32 least = ~0u;
        int token = 1 << 30;
#pragma unroll
        for (int i = 0; i < BLOCK; i++) {
            const bool there = i < pages && own.entry(call, first + i) >= 0 && !(taken >> i & 1);
            const u32 order = there ? order_of(likeness[i]) : ~0u;
            if (order < least) least = order, token = i * PAGE + lane;
        }
        const u32 of_all = __reduce_min_sync(FULL_WARP, least);
        chosen[n] = (int)__reduce_min_sync(FULL_WARP, least == of_all ? (u32)token : ~0u);
        if (chosen[n] == token) taken |= 1u << token / PAGE;
    }
    for (int c = lane; c < depth; c += 32) {
        float sum = 0;
#pragma unroll
        for (int n = 0; n < TELLING; n++)
            if (chosen[n] < pages * PAGE)
                sum += key_at(Page(call.pools, own.entry(call, first + chosen[n] / PAGE)), depth, c, chosen[n] % PAGE);
        row[c] = float_to_half(sum / TELLING);
    }
}

#define INDEXED_SCORES(name) SCORING_WITH(name, AS_PARAMETER(components) AS_PARAMETER(bits))

INDEXED_SCORES(representatives)
{
    __shared__ Memory shared;
    release_next();
    wait_previous();
    const Selection a = MAKE_SELECTION;
    const Call& call = a.call;
    Own own;
    if (!own.take(a, (int)parts, shared)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, depth = (int)call.head_dim;
    for (int page = own.missing + warp * own.each; page < own.end; page += WARPS * own.each)
        make_representative(call, own, page, own.each, shared.each[warp], a.index_row(own.s, own.head, page));
    sum_queries(call, shared.q);
    for (int page = own.begin + warp * own.each; page < own.end; page += WARPS * own.each) {
        const float score = product_of_halves(shared.q, a.index_row(own.s, own.head, page), depth);
        if (lane < own.each) a.scores_of(own.s, own.head)[page + lane] = own.entry(call, page + lane) < 0 ? -infinity() : score;
    }
}

INDEXED_SCORES(landmarks)
{
    __shared__ Memory shared;
    release_next();
    wait_previous();
    const Selection a = MAKE_SELECTION;
    const Call& call = a.call;
    Own own;
    if (!own.take(a, (int)parts, shared)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, depth = (int)call.head_dim;
    for (int page = own.begin + warp * own.each; page < own.end; page += WARPS * own.each) {
        u16* row = a.index_row(own.s, own.head, page);
        const int last = own.entry(call, page + own.each - 1);
        for (int c = lane; page >= own.missing && last >= 0 && c < depth; c += 32)
            row[c] = float_to_half(key_at(Page(call.pools, last), depth, c, PAGE - 1));
        __syncwarp();
        float score = -infinity();
        for (int h = 0; h < call.group(); h++) score = fmaxf(score, product_of_halves(shared.q + h * depth, row, depth));
        for (int i = lane; i < own.each; i += 32)
            a.scores_of(own.s, own.head)[page + i] = own.entry(call, page + i) < 0 ? -infinity() : score;
    }
}

INDEXED_SCORES(components_best)
{
    __shared__ Memory shared;
    release_next();
    wait_previous();
    const Selection a = MAKE_SELECTION;
    const Call& call = a.call;
    Own own;
    if (!own.take(a, (int)parts, shared)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, depth = (int)call.head_dim, rank = (int)a.index_width / PAGE;
    const float* vectors = at<float>(components) + (call.layer * call.kv_heads + own.head) * depth * depth;
    for (int page = own.missing + warp; page < own.end; page += WARPS) {
        const int entry = own.entry(call, page);
        u16* row = a.index_row(own.s, own.head, page);
        for (int first = 0; entry >= 0 && first < rank; first += AT_ONCE) {
            float x[AT_ONCE] = {};
#pragma unroll 1
            for (int quad = 0; quad < depth / 4; quad++) {
                const float4 k = four_keys(Page(call.pools, entry), depth, quad, lane);
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
                    x[i] += dot(k, *reinterpret_cast<const float4*>(vectors + min(first + i, rank - 1) * depth + 4 * quad));
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                if (first + i < rank) row[(first + i) * PAGE + lane] = float_to_half(x[i]);
        }
    }
    sum_queries(call, shared.q);
    float* weights = shared.each[0];
    for (int i = warp; i < rank; i += WARPS) {
        const float weight = product(shared.q, vectors + i * depth, depth);
        if (lane == 0) weights[i] = weight;
    }
    __syncthreads();
    for (int page = own.begin + warp; page < own.end; page += WARPS) {
        const u32* row = reinterpret_cast<const u32*>(a.index_row(own.s, own.head, page));
        float even = 0, odd = 0;  // tokens 2 * (lane % 16) and the next, each half of the warp every other component
        for (int i = lane / 16; i < rank; i += 2) {
            const float2 two = halves_to_floats(row[i * (PAGE / 2) + lane % 16]);
            even = fmaf(two.x, weights[i], even), odd = fmaf(two.y, weights[i], odd);
        }
        even += __shfl_xor_sync(FULL_WARP, even, 16), odd += __shfl_xor_sync(FULL_WARP, odd, 16);
        const float score = warp_max(fmaxf(even, odd));
        if (lane == 0) a.scores_of(own.s, own.head)[page] = own.entry(call, page) < 0 ? -infinity() : score;
    }
}

INDEXED_SCORES(collisions)
{
    __shared__ Memory shared;
    __shared__ u8 codes[HEADS * MOST_TABLES];  // of the queries
    release_next();
    wait_previous();
    const Selection a = MAKE_SELECTION;
    const Call& call = a.call;
    Own own;
    if (!own.take(a, (int)parts, shared)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, depth = (int)call.head_dim, group = call.group();
    const int tables = 2 * (int)a.index_width / PAGE, last = a.candidates(own.s, own.head, a.total(call.slots(own.s, own.head))).y;
    float *found = a.scores_of(own.s, own.head), *centre = shared.each[0];
    if (last < CENTRE_END) {  // nothing to be centred by yet
        for (int page = own.begin + threadIdx.x; page < own.end; page += SELECT_THREADS) found[page] = -infinity();
        return;
    }
    const int missing = *a.indexed_of(own.s, own.head) < CENTRE_END ? own.begin : own.missing;
    for (int c = threadIdx.x; missing < own.end && c < depth; c += SELECT_THREADS) {
        float sum = 0;
        int count = 0;
        for (int page = CENTRE; page < CENTRE_END; page++)
            for (int t = 0; t < PAGE && own.entry(call, page) >= 0; t++, count++)
                sum += key_at(Page(call.pools, own.entry(call, page)), depth, c, t);
        centre[c] = sum / max(count, 1);
    }
    for (int n = warp; n < group * tables; n += WARPS) {
        int code = 0;
        for (int bit = 0; bit < bits; bit++)
            code |= (product(shared.q + n / tables * depth, at<float>(components) + (n % tables * bits + bit) * depth, depth) > 0) << bit;
        if (lane == 0) codes[n] = code;
    }
    __syncthreads();
    for (int page = own.begin + warp; page < own.end; page += WARPS) {
        const int entry = own.entry(call, page);
        u8* row = reinterpret_cast<u8*>(a.index_row(own.s, own.head, page));
        for (int table = 0; page >= missing && entry >= 0 && table < tables; table++) {
            const float* planes = at<float>(components) + table * bits * depth;
            float x[AT_ONCE] = {};
#pragma unroll 1
            for (int quad = 0; quad < depth / 4; quad++) {
                const float4 k = four_keys(Page(call.pools, entry), depth, quad, lane);
                const float4 m = *reinterpret_cast<const float4*>(centre + 4 * quad);
                const float4 away = make_float4(k.x - m.x, k.y - m.y, k.z - m.z, k.w - m.w);
#pragma unroll
                for (int bit = 0; bit < AT_ONCE; bit++)
                    if (bit < bits) x[bit] += dot(away, *reinterpret_cast<const float4*>(planes + bit * depth + 4 * quad));
            }
            int code = 0;
#pragma unroll
            for (int bit = 0; bit < AT_ONCE; bit++) code |= (bit < bits && x[bit] > 0) << bit;
            row[table * PAGE + lane] = code;
        }
        int together = 0;
        for (int h = 0; h < group; h++) {
            int shares = 0;
            for (int table = 0; table < tables; table++) shares += row[table * PAGE + lane] == codes[h * tables + table];
            together += shares >= FEWEST ? shares : 0;
        }
        together = (int)__reduce_add_sync(FULL_WARP, (u32)together);
        if (lane == 0) found[page] = entry < 0 || together == 0 ? -infinity() : (float)together;
    }
}
