// Whole pages of floats, entries `sources`, to quantised ones, entries `targets`: parameters, then codes (page_formats.py).
// Grid: a block of 128 threads each page, up to the bucket's.  Dynamic shared memory: Sealing.
#include "page_values.cuh"

#define MOST_DEPTH 256

struct Sealing {
    float x[MOST_DEPTH * PAGE];            // rows of 32 values: channels of K, or [block of channels][token] of V
    float low[MOST_DEPTH], inverse[MOST_DEPTH], scales[MOST_DEPTH];
    u32 written[MOST_DEPTH];
    float sums[16];
    float theta;
    int skipped;
};

__device__ __forceinline__ u16 half_below(float x)
{
    u16 bits;
    asm("cvt.rm.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ u16 half_above(float x)
{
    u16 bits;
    asm("cvt.rp.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Parameters of one group from its range or, where symmetric, its largest value: to the page and to shared memory.
__device__ __forceinline__ void parameters(Sealing& s, int group, float low, float high, float largest, bool symmetric, int levels,
                                           u16* low_at, u16* step_at)
{
    u16 minimum, step;
    if (symmetric) {
        step = half_above(largest / (float)(levels / 2));
        minimum = float_to_half(-half_to_float(step) * (float)(levels / 2 + 1));
    } else {
        minimum = half_below(low);
        step = half_above((high - half_to_float(minimum)) / (float)levels);
    }
    *low_at = minimum, *step_at = step;
    s.low[group] = half_to_float(minimum), s.inverse[group] = half_to_float(step) > 0 ? 1.0f / half_to_float(step) : 0.0f;
}

__device__ __forceinline__ int code_of(const Sealing& s, int r, int i, int group, int levels)
{
    return (int)fminf(fmaxf(rintf((s.x[r * 32 + i] - s.low[group]) * s.inverse[group]), 0.0f), (float)levels);
}

// Codes of `rows` rows from row `first` on -> bytes at `to`. The group of a row is row / `per`, or where groups go by column column + 32
// * (row / per).
__device__ __forceinline__ void pack(const Sealing& s, int kind, int first, int rows, bool by_column, int per, u8* to)
{
    const int levels = (1 << kind) - 1;
    auto code = [&](int r, int i) {
        return code_of(s, first + r, i, by_column ? r / per * 32 + i : (first + r) / per, levels);
    };
    for (int n = threadIdx.x; n < rows * 4 * kind; n += blockDim.x) {
        int byte;
        const int i = n % 64 / 4, r = n % 4;
        if (kind == INT4) {
            byte = code(n / 64 * 4 + r, i) | code(n / 64 * 4 + r, i + 16) << 4;
        } else if (kind == INT8) {
            const int plane = n / (16 * rows), row = n % (16 * rows) / 64 * 4 + r, a = code(row, i), b = code(row, i + 16);
            byte = plane ? (a & 15) | (b & 15) << 4 : a >> 4 | b >> 4 << 4;
        } else if (n < 8 * rows) {
            byte = 0;
            for (int q = 0; q < 2; q++) {
                const int row = (2 * (n / 64) + q) * 4 + r;
                byte |= ((code(row, i) & 3) | (code(row, i + 16) & 3) << 2) << 4 * q;
            }
        } else {
            byte = 0;
            for (int q = 0; q < 4; q++) {
                const int row = (4 * ((n - 8 * rows) / 64) + q) * 4 + r;
                byte |= (code(row, i) >> 2 | code(row, i + 16) >> 2 << 1) << 2 * q;
            }
        }
        to[n] = (u8)byte;
    }
}

// A block of channels is written where one of them is further than Theta from what was written last. Sums in the order of every other
// device.
__device__ __forceinline__ void seal_deltas(Sealing& s, const Page& page, int depth)
{
    const int gate = page.kind(K_GAP), blocks = depth / gate, head = (4 + 4 * blocks + 63) / 64 * 64;
    for (int n = threadIdx.x; n < depth * PAGE; n += blockDim.x) s.x[n] = half_to_float(float_to_half(s.x[n]));
    __syncthreads();
    if (threadIdx.x < 16) {
        float total = 0;
        for (int r = 0; r < 2 * depth; r++) {
            const float x = s.x[16 * r + threadIdx.x];
            total = r ? __fadd_rn(total, __fmul_rn(x, x)) : __fmul_rn(x, x);
        }
        s.sums[threadIdx.x] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int size = 8; size; size /= 2)
            for (int i = 0; i < size; i++) s.sums[i] = __fadd_rn(s.sums[i], s.sums[i + size]);
        const float threshold = __int_as_float(page.kind(K_THRESHOLD));
        s.theta = half_to_float(float_to_half(__fmul_rn(threshold, sqrtf(s.sums[0] / (float)(PAGE * depth)))));
        s.skipped = 0;
    }
    __syncthreads();
    for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
        u32 written = 1;
        for (int t = 1, last = 0; t < PAGE; t++) {
            float far = 0;
            for (int c = b * gate; c < (b + 1) * gate; c++) far = fmaxf(far, fabsf(s.x[c * PAGE + t] - s.x[c * PAGE + last]));
            if (far > s.theta) written |= 1u << t, last = t;
        }
        s.written[b] = written;
        atomicAdd(&s.skipped, PAGE - __popc(written));
    }
    __syncthreads();
    const bool whole = (float)s.skipped / (float)((PAGE - 1) * depth / gate) < __int_as_float(page.kind(K_REFRESH));
    __syncthreads();
    u8* to = at<u8>(page.place(K));
    for (int n = threadIdx.x; n < page.pool[K_BYTES] / 4; n += blockDim.x)
        at<u32>(page.place(K))[n] = n == 0 ? whole ? 0 : __float_as_uint(s.theta) : n <= blocks ? whole ? ~0u : s.written[n - 1] : 0;
    __syncthreads();
    for (int c = threadIdx.x; c < depth; c += blockDim.x) {
        int before = 0;
        for (int b = 0; b < c / gate; b++) before += gate * (whole ? PAGE : __popc(s.written[b]));
        const u32 written = whole ? ~0u : s.written[c / gate];
        u16* values = reinterpret_cast<u16*>(to + head) + before + c % gate * __popc(written);
        for (int t = 0; t < PAGE; t++)
            if (written >> t & 1) *values++ = float_to_half(s.x[c * PAGE + t]);
    }
}

__device__ __forceinline__ void seal_keys(Sealing& s, const Page& page, int depth)
{
    const int kind = page.kind(K_KIND), levels = (1 << kind) - 1;
    if (kind == DELTA) return seal_deltas(s, page, depth);
    if (kind >= F16) {
        for (int n = threadIdx.x; n < depth * PAGE; n += blockDim.x)
            if (kind == F16) at<u16>(page.place(K))[n] = float_to_half(s.x[n]);
            else at<float>(page.place(K))[n] = s.x[n];
        return;
    }
    u16* params = at<u16>(page.place(K_PARAMS));
    const bool by_row = page.kind(K_AXIS) == BY_ROW;
    const int size = by_row ? 1 : page.kind(GROUPS) == 1 ? depth : 32, groups = by_row ? depth : (depth + size - 1) / size * 32;
    for (int n = threadIdx.x; n < groups; n += blockDim.x) {
        float low = infinity(), high = -infinity();
        const int first = by_row ? n : n / 32 * size;
        for (int k = 0; k < (by_row ? 32 : min(size, depth - first)); k++) {
            const float x = by_row ? s.x[n * 32 + k] : s.x[(first + k) * 32 + n % 32];
            low = fminf(low, x), high = fmaxf(high, x);
        }
        u16* to = by_row ? params + n : params + n / 32 * 64 + n % 32;
        parameters(s, n, low, high, fmaxf(-low, high), !by_row && page.kind(SYMMETRIC), levels, to, to + (by_row ? depth : 32));
    }
    __syncthreads();
    pack(s, kind, 0, depth, !by_row, size, at<u8>(page.place(K)));
}

__device__ __forceinline__ void seal_values(Sealing& s, const Page& page, int depth)
{
    const int kind = page.kind(V_KIND), levels = (1 << kind) - 1, blocks = (depth + 31) / 32, width = 32 * blocks;
    const int groups = page.kind(GROUPS);
    if (kind >= F16) {
        for (int n = threadIdx.x; n < width * PAGE; n += blockDim.x) {
            const float x = s.x[n % width / 32 * 1024 + n / width * 32 + n % 32];
            if (kind == F16) at<u16>(page.place(V))[n] = float_to_half(x);
            else at<float>(page.place(V))[n] = x;
        }
        return;
    }
    u16* params = at<u16>(page.place(V_PARAMS));
    if (page.kind(SEPARATED)) {  // each channel over the root of its largest value (ZipCache)
        for (int c = threadIdx.x; c < width; c += blockDim.x) {
            float* column = s.x + c / 32 * 1024 + c % 32;
            float largest = 0;
            for (int t = 0; t < PAGE; t++) largest = fmaxf(largest, fabsf(column[32 * t]));
            u16 bits = float_to_half(sqrtf(largest));
            if (bits == 0) bits = 0x3C00;  // 1 where all is 0
            params[64 * groups + c] = bits;
            for (int t = 0; t < PAGE; t++) column[32 * t] = column[32 * t] / half_to_float(bits);
        }
        __syncthreads();
    }
    for (int n = threadIdx.x; n < 32 * blocks; n += blockDim.x) {  // [block][token]
        float low = infinity(), high = -infinity();
        for (int b = groups == 1 ? 0 : n / 32; b < (groups == 1 ? blocks : n / 32 + 1); b++)
            for (int i = 0; i < 32; i++) {
                const float x = s.x[b * 1024 + n % 32 * 32 + i];
                low = fminf(low, x), high = fmaxf(high, x);
            }
        u16* to = params + (groups == 1 ? 0 : n / 32 * 64) + n % 32;  // where groups are one, all blocks write the same
        parameters(s, n, low, high, fmaxf(-low, high), page.kind(SYMMETRIC), levels, to, to + 32);
    }
    __syncthreads();
    for (int b = 0; b < blocks; b++) pack(s, kind, 32 * b, 32, false, 1, at<u8>(page.place(V) + b * page.pool[V_BLOCK]));
}

KERNEL seal_pages(i64 pools, i64 sources, i64 targets, i64 head_dim, i64 count_index, i64 state)
{
    DYNAMIC_SHARED(float4, memory);
    Sealing& s = *reinterpret_cast<Sealing*>(memory);
    wait_previous();
    const int depth = (int)head_dim, width = (depth + 31) / 32 * 32;
    if (blockIdx.x >= at<i64>(state)[count_index]) return;
    const Page source(pools, at<int>(sources)[blockIdx.x]), page(pools, at<int>(targets)[blockIdx.x]);
    for (int n = threadIdx.x; n < depth * PAGE; n += blockDim.x) s.x[n] = key_at(source, depth, n / PAGE, n % PAGE);
    __syncthreads();
    seal_keys(s, page, depth);
    __syncthreads();
    for (int n = threadIdx.x; n < width * PAGE; n += blockDim.x)
        s.x[n % width / 32 * 1024 + n / width * 32 + n % 32] = value_at(source, depth, n / width, n % width);
    __syncthreads();
    seal_values(s, page, depth);
}
