// What the blocks of a gang tell each other: those of one (sequence, KV head), all of them on the device at once. A word is a float and
// which turn of the gang it belongs to, stored and loaded as one: whoever finds the turn has the float, without a barrier or a fence (as
// NCCL's LL protocol has it). This memory begins as zeros, and nothing else writes to it, so that what lies there is of earlier turns.
#pragma once
#include "page_pool.cuh"

#define MOST_GANGS 1024     // of a launch
#define TOLD (8 * 130 + 2)  // words of a block: up to 8 query heads, each 128 channels and two numbers; whether it has come; one to spare
#define MOST_SCORES 8192    // of a gang

struct Exchange {
    i64 memory, blocks;  // where it is; blocks of a launch, at most

    __device__ __forceinline__ u32* turn(int gang) const { return at<u32>(memory) + gang; }
    // A gang's words are at the same place in every launch, or those of another one might be taken for them. Gang n - 1 has at most a
    // n-th of all blocks: the largest power of two in n of them have room for as many blocks as a launch.
    __device__ __forceinline__ u64* words(int gang, int block) const
    {
        const int power = 31 - __clz(gang + 1);
        const i64 place = power * blocks + (gang + 1 - (1 << power)) * (blocks >> power) + block;
        return at<u64>(memory + 4 * MOST_GANGS) + place * TOLD;
    }
    __device__ __forceinline__ u64* scores(int gang) const  // behind all words
    {
        return words((1 << 32 - __clz((int)blocks >> 1)) - 1, 0) + (i64)gang * MOST_SCORES;
    }
};

__device__ __forceinline__ u64 word_of(float x, u32 turn) { return (u64)turn << 32 | __float_as_uint(x); }
__device__ __forceinline__ float told_by(u64 word) { return __uint_as_float((u32)word); }
__device__ __forceinline__ u32 turn_of(u64 word) { return (u32)(word >> 32); }

__device__ __forceinline__ void tell(u64* to, float x, u32 turn)
{
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word_of(x, turn)) : "memory");
}

__device__ __forceinline__ void tell_two(u64* to, float x, float y, u32 turn)  // to: of 16 bytes
{
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(word_of(x, turn)), "l"(word_of(y, turn)) : "memory");
}

__device__ __forceinline__ u64 hear(const u64* from)
{
    u64 word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

__device__ __forceinline__ void hear_two(u64 (&words)[2], const u64* from)
{
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(words[0]), "=l"(words[1]) : "l"(from) : "memory");
}

// The turn that a launch is of. Once the kernel before has ended; who has heard from all blocks of the gang ends it.
__device__ __forceinline__ u32 next_turn(const u32* turn)
{
    u32 last;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(last) : "l"(turn) : "memory");
    return last + 1;
}

__device__ __forceinline__ void pause(u32 ns) { asm volatile("nanosleep.u32 %0;" ::"r"(ns)); }  // at most so long
