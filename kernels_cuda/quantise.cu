// Activations of all tokens to int8, for the kernels that read them from memory.
//
// x float32. codes: u8 [tokens, pitch], info: UnitInfo [units, info_pitch], a unit's tokens side by side. Units from `units` to `padded` (K
// filled up to what the matrix product takes at a time) become zeros. Block: 128 threads; grid: (tokens, parts of the row).
#include "quantise.cuh"

template <int BITS, int UNIT>
__device__ __forceinline__ void quantise(const float* x, i64 x_stride, u32* codes, i64 pitch_words, UnitInfo* info, int info_pitch,
                                         const i64* state, int tokens_at, int k, int units, int padded, int block_shift)
{
    const i64 count = state[tokens_at];
    release_next();
    wait_previous();
    constexpr int PARTS = UNIT / 8;
    const int token = blockIdx.x, lane = threadIdx.x % 32;
    if (token >= count) return;
    x += token * x_stride;
    const bool fast = ((u64)x & 15) == 0 && k % 8 == 0;
    const int thread = (blockIdx.y * blockDim.x + threadIdx.x) / 32 * 32, whole = (padded * PARTS + 31) / 32 * 32;
    for (int first = thread; first < whole; first += gridDim.y * blockDim.x) {
        const int unit = (first + lane) / PARTS;
        float v[1][8], top[1];
        if (fast) load8<true>(v[0], x, unit * UNIT + lane % PARTS * 8, unit < units ? k : 0);
        else load8<false>(v[0], x, unit * UNIT + lane % PARTS * 8, unit < units ? k : 0);
        tops_of<UNIT>(top, v, block_shift);
        u32* to = codes + token * pitch_words + unit * (UNIT / 4);
        const UnitInfo made = quantise_unit<BITS, UNIT>(v[0], top[0], lane % PARTS, to, unit < padded);
        if (unit < padded && lane % PARTS == 0) info[(i64)unit * info_pitch + token] = made;
    }
}

#define QUANTISE(BITS, UNIT)                                                                                                            \
    KERNEL __launch_bounds__(128)                                                                                                       \
    quantise_##BITS##_##UNIT(const float* x, i64 x_stride, u32* codes, i64 pitch_words, UnitInfo* info, int info_pitch, const i64* state,  \
                             int tokens_at, int k, int units, int padded, int block_shift)                                              \
    {                                                                                                                                   \
        quantise<BITS, UNIT>(x, x_stride, codes, pitch_words, info, info_pitch, state, tokens_at, k, units, padded, block_shift);       \
    }

QUANTISE(2, 32)
QUANTISE(3, 32)
QUANTISE(4, 32)
QUANTISE(8, 32)
QUANTISE(2, 16)
QUANTISE(4, 16)
QUANTISE(8, 16)
