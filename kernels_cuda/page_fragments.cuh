// Pages as operands of tensor cores. A page's rows (channels of K, tokens of V) are what is summed over, its 32 columns are the matrix'
// rows.
// Lane 4 g + j takes of 32 rows the eight from 8 j on: two quads, one for each of two steps of 16 rows. Of quantised quads it reads eight
// bytes, of which each four become an operand: column 2 g (or 2 g + 1) is matrix row g, the column 16 further is row g + 8, and of a quad
// the rows 0 and 2 stand in one register, 1 and 3 in the other. What is multiplied with them is ordered the same way (paired()).
// Pages lie in shared memory, their pieces of 16 bytes exchanged so that lanes of different j meet no bank twice (swizzled()).
#pragma once
#include "page_pool.cuh"

struct Operand { u32 a[4]; };

// Where byte `offset` of a side stands. SHIFT: from which bit on offsets tell j.
template <int SHIFT> __device__ __forceinline__ int swizzled(int offset) { return offset ^ (offset >> SHIFT & 3) << 5; }
// Sums of its constant parts are written apart: the compiler does not see that they are.
// Of codes j changes every 128 bytes, of keys in halves every 8 rows of 64, of values in halves every 8 rows of 2 D.
template <int KIND, int D> __device__ __forceinline__ constexpr int key_shift() { return KIND == F16 ? 9 : 7; }
template <int KIND, int D> __device__ __forceinline__ constexpr int value_shift() { return KIND == F16 ? D == 128 ? 11 : 10 : 7; }

// From eight neighbouring halves to those of two steps: [step][rows 0 and 2, rows 1 and 3].
__device__ __forceinline__ void paired(uint4 x, u32 (&to)[2][2]) {
    to[0][0] = low_halves(x.x, x.y), to[0][1] = high_halves(x.x, x.y);
    to[1][0] = low_halves(x.z, x.w), to[1][1] = high_halves(x.z, x.w);
}

// Codes become halves without arithmetic: their bits alone are tiny numbers, the code times TINY, which tensor cores multiply exactly. What
// comes out is divided by TINY once. Codes that stand four bits higher (int4's columns 16 further, matrix rows g + 8) are 16 times larger.
#define TINY 5.9604644775390625e-8f  // 2^-24, the last bit of a half

template <int BITS, int SHIFT> __device__ __forceinline__ u32 codes(u32 word)
{
    const u32 mask = ((1u << BITS) - 1) << SHIFT;
    return word & (mask | mask << 16);
}

// What one lane reads of 32 rows of `KIND`: of `rows` rows' codes from byte `from` of a side on, those from row 32 * block on.
// ALIKE: all codes of an operand times TINY, int4's too.
// FAR: straight from the page in device memory.
template <int KIND, bool FAR> struct Codes;

template <> struct Codes<INT4, false> {
    uint2 step[2];
    __device__ __forceinline__ void load(const u8* side, int from, int block, int rows, int g, int j, int bits) {
        const int own = swizzled<7>(128 * j + 8 * g);
        for (int u = 0; u < 2; u++) step[u] = *reinterpret_cast<const uint2*>(side + (own ^ 64 * u) + from + 512 * block);
    }
    template <bool ALIKE> __device__ __forceinline__ Operand operand(int u, int second) const {
        const u32 x = second ? step[u].y : step[u].x, y = x >> 8;
        if (ALIKE) return {{codes<4, 0>(x), codes<4, 0>(x >> 4), codes<4, 0>(y), codes<4, 0>(y >> 4)}};
        return {{codes<4, 0>(x), codes<4, 4>(x), codes<4, 0>(y), codes<4, 4>(y)}};
    }
};

template <> struct Codes<INT8, false> {
    uint2 high[2], low[2];
    __device__ __forceinline__ void load(const u8* side, int from, int block, int rows, int g, int j, int bits) {
        const int own = swizzled<7>(128 * j + 8 * g);
        for (int u = 0; u < 2; u++) {
            high[u] = *reinterpret_cast<const uint2*>(side + (own ^ 64 * u) + from + 512 * block);
            low[u] = *reinterpret_cast<const uint2*>(side + (own ^ 64 * u) + from + rows * 16 + 512 * block);
        }
    }
    template <bool ALIKE> __device__ __forceinline__ Operand operand(int u, int second) const {
        const u32 x = second ? high[u].y : high[u].x, y = second ? low[u].y : low[u].x;
        const u32 first = (x & 0x0F0F0F0Fu) << 4 | (y & 0x0F0F0F0Fu), other = (x & 0xF0F0F0F0u) | (y >> 4 & 0x0F0F0F0Fu);
        return {{codes<8, 0>(first), codes<8, 0>(other), codes<8, 0>(first >> 8), codes<8, 0>(other >> 8)}};
    }
};

// Two bits as well, with `bits` 2: there are no third ones then. One instance for both: there are many pairs of types.
template <> struct Codes<INT3, false> {
    uint2 both, top;
    __device__ __forceinline__ void load(const u8* side, int from, int block, int rows, int g, int j, int bits) {
        both = *reinterpret_cast<const uint2*>(side + swizzled<7>(from + (4 * block + j) * 64 + 8 * g));
        top = make_uint2(0, 0);
        if (bits == INT3) top = *reinterpret_cast<const uint2*>(side + swizzled<7>(from + rows * 8 + (2 * block + j / 2) * 64 + 8 * g));
        top.x >>= 4 * (j & 1), top.y >>= 4 * (j & 1);  // each byte's upper bits may hold a neighbour's: masked below
    }
    template <bool ALIKE> __device__ __forceinline__ Operand operand(int u, int second) const {
        const u32 x = (second ? both.y : both.x) >> 4 * u, t = (second ? top.y : top.x) >> 2 * u;
        const u32 first = (x & 0x03030303u) | (t & 0x01010101u) << 2, other = (x >> 2 & 0x03030303u) | (t & 0x02020202u) << 1;
        return {{codes<4, 0>(first), codes<4, 0>(other), codes<4, 0>(first >> 8), codes<4, 0>(other >> 8)}};
    }
};

// Keys in halves: rows of 32 tokens. Matrix rows g and g + 8 are the columns 4 g and 4 g + 1, of the second operand 4 g + 2 and 4 g + 3.
template <bool FAR> struct Codes<F16, FAR> {
    uint2 row[2][4];
    __device__ __forceinline__ void load(const u8* side, int from, int block, int rows, int g, int j, int bits) {
        const int own = swizzled<FAR ? 31 : 9>(512 * j + 8 * g);
        for (int u = 0; u < 2; u++)
            for (int i = 0; i < 4; i++)
                row[u][i] = *reinterpret_cast<const uint2*>(side + (own ^ 64 * (i % 2)) + from + 2048 * block + 256 * u + 128 * (i / 2));
    }
    template <bool ALIKE> __device__ __forceinline__ Operand operand(int u, int second) const {
        const u32 x0 = second ? row[u][0].y : row[u][0].x, x1 = second ? row[u][1].y : row[u][1].x;
        const u32 x2 = second ? row[u][2].y : row[u][2].x, x3 = second ? row[u][3].y : row[u][3].x;
        return {{low_halves(x0, x2), high_halves(x0, x2), low_halves(x1, x3), high_halves(x1, x3)}};
    }
};
