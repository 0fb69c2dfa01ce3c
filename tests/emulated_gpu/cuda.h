// CUDA C++ on an x86-64 CPU, as much of it as kernels_cuda uses: a block's threads are fibers of one CPU thread, which take turns at
// barriers; blocks run one after another, but those of a gang, each on a CPU thread of its own, of whose state there is one for each
// (EMULATED_GANGS). It shows whether a kernel computes what it should, not how fast it would be.
#pragma once
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef EMULATED_GANGS
#define OF_BLOCK static thread_local
#else
#define OF_BLOCK static
#endif

#define __CUDA_ARCH__ 870
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __shared__ OF_BLOCK
#define __launch_bounds__(...)

#define __expf expf  // the C library has functions of these names
#define __logf logf

template <class A, class B> std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }
template <class A, class B> std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- threads ------------------------------------------------------------------------------------------------------
namespace emulated {
const unsigned MOST = 1024, WARP = 32, BARRIERS = 16;
const size_t STACK = 256 << 10, SHARED = 256 << 10;

struct Copy { void* to; const void* from; int bytes, size; };  // size: how many of `bytes` are read, the rest are zeros

struct Thread {
    void* stack;
    bool done;
    uint64_t slot[4];                        // what other threads of the warp may read
    std::vector<std::vector<Copy>> copies;   // asynchronous ones, by group; the last group is open
};

struct Barrier {
    unsigned arrived = 0, passed = 0;        // threads of this turn; turns
    int votes = 0, counted = 0;
};

OF_BLOCK Thread* threads;
OF_BLOCK Barrier block_barrier, warp_barriers[MOST / WARP], named_barriers[BARRIERS];
OF_BLOCK unsigned now, living, warp_living[MOST / WARP];
OF_BLOCK dim3 block, grid, block_size;
alignas(128) OF_BLOCK char shared[SHARED];      // dynamic shared memory
OF_BLOCK char* stacks;
OF_BLOCK void* main_stack;
OF_BLOCK void (*entry)(void**);
OF_BLOCK void** entry_arguments;
OF_BLOCK std::chrono::steady_clock::time_point began;
static std::mutex atomic;

extern "C" void emulated_switch(void** from, void* to);
asm(".text\n.globl emulated_switch\nemulated_switch:\n push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp, (%rdi)\n mov %rsi, %rsp\n pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

[[noreturn]] inline void fail(const char* what)
{
    fprintf(stderr, "emulated GPU: %s (block %u, %u, %u, thread %u)\n", what, block.x, block.y, block.z, now);
    abort();
}

}  // namespace emulated

// What the compiler calls with -fsanitize=alignment, as it would the sanitizer's own library.
extern "C" __attribute__((used)) inline void __ubsan_handle_type_mismatch_v1(void* about, uintptr_t)
{
    static thread_local char what[300];
    struct Place { const char* file; unsigned line, column; };
    snprintf(what, sizeof(what), "an address that is not aligned, line %u of the source without comments", ((Place*)about)->line);
    emulated::fail(what);
}

namespace emulated {
inline unsigned following(unsigned thread)
{
    for (unsigned n = 0; n < block_size.x; n++) {
        thread = (thread + 1) % block_size.x;
        if (!threads[thread].done) return thread;
    }
    return thread;
}

inline void yield()
{
    const unsigned before = now, after = following(now);
    if (before == after) fail("a barrier that nobody else will reach");
    now = after;
    emulated_switch(&threads[before].stack, threads[after].stack);
}

inline void pass(Barrier& barrier)
{
    barrier.arrived = 0;
    barrier.passed++;
    barrier.counted = barrier.votes;
    barrier.votes = 0;
}

inline void wait(Barrier& barrier, unsigned expected)
{
    const unsigned turn = barrier.passed;
    if (++barrier.arrived == expected) return pass(barrier);
    for (unsigned long long turns = 0; barrier.passed == turn; yield())
        if (++turns > 20000000) fail("a deadlock at a barrier");
}

inline void wait_warp() { wait(warp_barriers[now / WARP], warp_living[now / WARP]); }

inline int vote_block(bool yes)
{
    block_barrier.votes += yes;
    wait(block_barrier, living);
    const int counted = block_barrier.counted;
    wait(block_barrier, living);  // before the next vote
    return counted;
}

// what the lane of this warp has in x
template <class T> T exchange(T x, unsigned lane)
{
    static_assert(sizeof(T) <= 8, "of 8 bytes at most");
    memcpy(threads[now].slot, &x, sizeof(T));
    wait_warp();
    memcpy(&x, threads[now / WARP * WARP + lane % WARP].slot, sizeof(T));
    wait_warp();
    return x;
}

inline void finish_copies(size_t left)
{
    auto& groups = threads[now].copies;
    while (groups.size() > left + 1) {
        for (const Copy& copy : groups.front()) {
            memset(copy.to, 0, copy.bytes);
            memcpy(copy.to, copy.from, copy.size);
        }
        groups.erase(groups.begin());
    }
}

inline void start()
{
    entry(entry_arguments);
    const unsigned own = now, warp = now / WARP;
    threads[own].done = true;
    living--, warp_living[warp]--;
    if (living && block_barrier.arrived == living) pass(block_barrier);
    if (warp_living[warp] && warp_barriers[warp].arrived == warp_living[warp]) pass(warp_barriers[warp]);
    void* nowhere;
    if (living) now = following(own);
    emulated_switch(&nowhere, living ? threads[now].stack : main_stack);
}

inline void run_block(dim3 place)
{
    block = place, began = std::chrono::steady_clock::now();
    living = block_size.x;
    block_barrier = Barrier();
    std::fill(std::begin(named_barriers), std::end(named_barriers), Barrier());
    std::fill(std::begin(warp_barriers), std::end(warp_barriers), Barrier());
    memset(shared, 0xcd, sizeof(shared));  // nothing may rely on zeros
    for (unsigned t = 0; t < block_size.x; t++) {
        warp_living[t / WARP] = min(WARP, block_size.x - t / WARP * WARP);
        void** top = (void**)(stacks + STACK * (t + 1)) - 2;
        top[0] = (void*)start, top[1] = nullptr;
        memset(top - 6, 0, 6 * sizeof(void*));  // the registers that a switch takes from the stack
        threads[t].stack = top - 6, threads[t].done = false;
        threads[t].copies.assign(1, {});
    }
    now = 0;
    emulated_switch(&main_stack, threads[0].stack);
}

template <class... A, size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>)
{
    kernel(*static_cast<std::remove_cv_t<std::remove_reference_t<A>>*>(arguments[I])...);
}

template <class... A> void call(void (*kernel)(A...), void** arguments)
{
    call(kernel, arguments, std::index_sequence_for<A...>());
}
}  // namespace emulated

// A kernel's whole grid; kernel: its entry, which takes addresses of arguments as cuLaunchKernel does. gang: how many neighbours wait for
// each other. Not 0: what it asks for is too much
extern "C" int emulated_launch(void (*kernel)(void**), unsigned x, unsigned y, unsigned z, unsigned threads, unsigned shared, unsigned gang,
                               void** arguments)
{
    using namespace emulated;
    if (threads > MOST || shared > SHARED || !threads || x % gang) return 1;
    auto run = [&](unsigned first, unsigned step) {
        if (!stacks) stacks = (char*)malloc(STACK * MOST), emulated::threads = new Thread[MOST];
        entry = kernel, entry_arguments = arguments, grid = {x, y, z}, block_size = {threads, 1, 1};
        for (unsigned k = 0; k < z; k++)
            for (unsigned j = 0; j < y; j++)
                for (unsigned i = first; i < x; i += step) run_block({i, j, k});
    };
#ifdef EMULATED_GANGS
    std::vector<std::thread> blocks;  // one of each gang: gangs come one after another as far as they wait for each other
    for (unsigned b = 0; b < gang; b++) blocks.emplace_back([&, b] {
        run(b, gang);
        free(stacks), delete[] emulated::threads;
    });
    for (auto& block : blocks) block.join();
#else
    if (gang > 1) return 1;
    run(0, 1);
#endif
    return 0;
}

#define threadIdx (dim3{emulated::now, 0, 0})
#define blockIdx emulated::block
#define blockDim emulated::block_size
#define gridDim emulated::grid

inline void __syncthreads() { emulated::wait(emulated::block_barrier, emulated::living); }
inline int __syncthreads_count(int yes) { return emulated::vote_block(yes); }
inline int __syncthreads_or(int yes) { return emulated::vote_block(yes) > 0; }
inline int __syncthreads_and(int yes) { return emulated::vote_block(!yes) == 0; }
inline void __syncwarp(unsigned = 0) { emulated::wait_warp(); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T> T __shfl_sync(unsigned, T x, int lane) { return emulated::exchange(x, lane); }
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) { return emulated::exchange(x, threadIdx.x % 32 ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T x, unsigned by)
{
    const unsigned lane = threadIdx.x % 32;
    return emulated::exchange(x, lane >= by ? lane - by : lane);
}
template <class T> T __shfl_down_sync(unsigned, T x, unsigned by)
{
    const unsigned lane = threadIdx.x % 32;
    return emulated::exchange(x, lane + by < 32 ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned, int yes)
{
    unsigned found = 0;
    emulated::threads[emulated::now].slot[0] = yes != 0;
    emulated::wait_warp();
    const unsigned first = emulated::now / 32 * 32;
    for (unsigned lane = 0; lane < 32 && first + lane < blockDim.x; lane++)
        found |= (unsigned)(!emulated::threads[first + lane].done && emulated::threads[first + lane].slot[0]) << lane;
    emulated::wait_warp();
    return found;
}
inline int __any_sync(unsigned mask, int yes) { return __ballot_sync(mask, yes) != 0; }
inline int __all_sync(unsigned mask, int yes) { return __ballot_sync(mask, !yes) == 0; }
template <class F> unsigned emulated_reduce(unsigned x, F join)
{
    for (int step = 16; step; step >>= 1) x = join(x, __shfl_xor_sync(0, x, step));
    return x;
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) { return emulated_reduce(x, [](unsigned a, unsigned b) { return a + b; }); }
inline unsigned __reduce_min_sync(unsigned, unsigned x) { return emulated_reduce(x, [](unsigned a, unsigned b) { return min(a, b); }); }
inline unsigned __reduce_max_sync(unsigned, unsigned x) { return emulated_reduce(x, [](unsigned a, unsigned b) { return max(a, b); }); }

template <class T, class F> T emulated_update(T* p, F f)
{
#ifdef EMULATED_GANGS
    const std::lock_guard<std::mutex> alone(emulated::atomic);
#endif
    const T before = *p;
    return *p = f(before), before;
}
template <class T, class U> T atomicAdd(T* p, U x) { return emulated_update(p, [x](T y) { return T(y + T(x)); }); }
template <class T, class U> T atomicMin(T* p, U x) { return emulated_update(p, [x](T y) { return min(y, T(x)); }); }
template <class T, class U> T atomicMax(T* p, U x) { return emulated_update(p, [x](T y) { return max(y, T(x)); }); }
template <class T, class U> T atomicOr(T* p, U x) { return emulated_update(p, [x](T y) { return T(y | T(x)); }); }

// ---- numbers ------------------------------------------------------------------------------------------------------
template <class To, class From> To emulated_bits(From x)
{
    To y;
    static_assert(sizeof(x) == sizeof(y), "of one size");
    memcpy(&y, &x, sizeof(x));
    return y;
}
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float2int_rn(float x) { return (int)nearbyintf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __dp4a(int a, int b, int c)
{
    for (int i = 0; i < 32; i += 8) c += int((int8_t)(a >> i)) * int((int8_t)(b >> i));
    return c;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select)
{
    const uint64_t both = (uint64_t)b << 32 | a;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= unsigned(both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
    return found;
}
inline size_t __cvta_generic_to_shared(const void* p) { return (const char*)p - emulated::shared; }  // 32 bits hold it, signed
