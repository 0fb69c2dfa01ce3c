// Where a prompt's keys are cut into chunks: where the mean keys of the four tokens before and the four after differ in direction, the
// strongest such places first, each ruling out its neighbours (dhsa_chunks.py, boundaries).
//   compare_sides  turns [kv_heads][slots of all sequences] float32: at i one less the cosine, of a boundary before token i + SIDE.
//                  Grid (pages, kv_heads, sequences), block 128
//   settle_cuts    states [kv_heads][slots of all sequences] bytes: whether there is one, or that more of the neighbourhood has to say.
//                  Grid (slots / OWN, kv_heads, sequences), block CHOICE_THREADS
//   number_chunks  starts [kv_heads][PAGE_CHUNKS each page of all sequences] int32, ascending, of the strongest of these; counts [kv_heads]
//                  [query blocks of all sequences]: how many, at a sequence's first block. taken, weights: room of the size of starts.
//                  Grid (1, kv_heads, sequences), block CHOICE_THREADS
#include "key_chunks.cuh"
#include "page_values.cuh"

#define OWN 512      // places that a block settles
#define AROUND 256   // that it looks at on either side of these
#define WINDOW (OWN + 2 * AROUND)

enum State { NONE, CUT, OPEN };

KERNEL compare_sides(CALL_PARAMETERS CHOICE_PARAMETERS CHUNK_PARAMETERS)
{
    __shared__ float room[3][4][32];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Chunks cut = MAKE_CHUNKS;
    const int s = blockIdx.z, head = blockIdx.y, p = blockIdx.x, depth = (int)call.head_dim;
    const int warp = threadIdx.x / 32, t = threadIdx.x % 32;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there) return;
    const Together heads(call, s, head);
    const int slots = call.slots(s, head);
    if (head != heads.first || p * PAGE >= slots) return;
    float left = 0, right = 0, both = 0;
    for (int h = head; h < head + heads.count; h++) {
        const int here = call.table(s, h)[p], next = (p + 1) * PAGE < slots ? call.table(s, h)[p + 1] : -1;
        const Page page(call.pools, max(here, 0)), other(call.pools, max(next, 0));
        for (int c = warp; c < depth; c += 4) {
            float a = here >= 0 && p * PAGE + t < slots ? key_at(page, depth, c, t) : 0;  // of this page, and of the next one
            float b = next >= 0 && t < 2 * SIDE && (p + 1) * PAGE + t < slots ? key_at(other, depth, c, t) : 0;
            const auto later = [&](int tokens) {
                const float x = __shfl_sync(FULL_WARP, a, (t + tokens) % 32), y = __shfl_sync(FULL_WARP, b, (t + tokens) % 32);
                return make_float2(t + tokens < 32 ? x : y, t + tokens < 32 ? y : 0);
            };
#pragma unroll
            for (int tokens = 1; tokens < SIDE; tokens *= 2) {
                const float2 more = later(tokens);
                a += more.x, b += more.y;
            }
            const float after = later(SIDE).x;
            left += a * a, right += after * after, both += a * after;
        }
    }
    room[0][warp][t] = left, room[1][warp][t] = right, room[2][warp][t] = both;
    __syncthreads();
    if (warp || p * PAGE + t >= slots) return;
    for (int w = 1; w < 4; w++) left += room[0][w][t], right += room[1][w][t], both += room[2][w][t];
    at<float>(turns)[cut.page(start, head) * PAGE + p * PAGE + t] = 1 - both / sqrtf(fmaxf(left * right, 1e-30f));
}

// Settle places from `begin` on as far as a window tells: a place without a neighbour that comes first is a cut, and its neighbours are
// none. Whose neighbours are not all in the window stays open. By all threads.
__device__ __forceinline__ void settle(const float* scores, u8* states, int begin, int count)
{
    bool found = true;
    while (found) {
        u8 next[WINDOW / CHOICE_THREADS];
        found = false;
#pragma unroll
        for (int i = 0; i < WINDOW / CHOICE_THREADS; i++) {
            const int n = i * CHOICE_THREADS + threadIdx.x;
            next[i] = states[n];
            if (next[i] != OPEN) continue;
            const float own = scores[n];
            bool first = true, beaten = false;
            for (int other = max(n - APART, 0); other <= min(n + APART, WINDOW - 1); other++) {
                beaten |= states[other] == CUT;
                first &= states[other] != OPEN || other == n || scores[other] < own || (scores[other] == own && n < other);
            }
            const bool known = (n >= APART || begin == 0) && (n + APART < WINDOW || begin + WINDOW >= count);
            next[i] = beaten ? NONE : first && known ? CUT : OPEN;
            found |= next[i] != OPEN;
        }
        found = __syncthreads_or(found);
#pragma unroll
        for (int i = 0; i < WINDOW / CHOICE_THREADS; i++) states[i * CHOICE_THREADS + threadIdx.x] = next[i];
        __syncthreads();
    }
}

__device__ __forceinline__ int places_of(int slots) { return max(0, slots - 2 * SIDE + 1); }

KERNEL settle_cuts(CALL_PARAMETERS CHOICE_PARAMETERS CHUNK_PARAMETERS)
{
    __shared__ float score[WINDOW];
    __shared__ u8 now[WINDOW];
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Chunks cut = MAKE_CHUNKS;
    const int s = blockIdx.z, head = blockIdx.y, own = blockIdx.x * OWN, begin = max(0, own - AROUND);
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there || head != Together(call, s, head).first) return;
    const int slots = call.slots(s, head), count = places_of(slots);
    if (own >= slots) return;
    const i64 first = cut.page(start, head) * PAGE;
    const float least = __int_as_float((int)turn);
    for (int n = threadIdx.x; n < WINDOW; n += CHOICE_THREADS) {
        const bool there = begin + n < count;
        score[n] = there ? at<float>(turns)[first + begin + n] : 0;
        now[n] = there && score[n] > least ? OPEN : NONE;
    }
    __syncthreads();
    settle(score, now, begin, count);
    for (int n = own + threadIdx.x; n < min(own + OWN, (slots + PAGE - 1) / PAGE * PAGE); n += CHOICE_THREADS)
        at<u8>(states)[first + n] = now[n - begin];
}

KERNEL number_chunks(CALL_PARAMETERS CHOICE_PARAMETERS CHUNK_PARAMETERS)
{
    __shared__ float score[WINDOW];
    __shared__ u8 now[WINDOW];
    __shared__ Totals room;
    wait_previous();
    const Call call = MAKE_CALL;
    const Choice choice = MAKE_CHOICE;
    const Chunks cut = MAKE_CHUNKS;
    const int s = blockIdx.z, head = blockIdx.y;
    const QueryBlock start(call, choice, s, head, 0);
    if (!start.there || head != Together(call, s, head).first) return;
    const int slots = call.slots(s, head), count = places_of(slots), windows = (count + OWN - 1) / OWN;
    const i64 first = cut.page(start, head);
    const float* turned = at<float>(turns) + first * PAGE;
    u8* all = at<u8>(states) + first * PAGE;
    const auto is_open = [&](int from, int to) {  // whether a place from `from` up to `to`, multiples of 4, is
        bool open = false;
        for (int n = from / 4 + threadIdx.x; 4 * n < to; n += CHOICE_THREADS) open |= (at<u32>((i64)all)[n] & 0x02020202u) != 0;
        return __syncthreads_or(open) != 0;
    };
    // What a long way of places, each waiting for the next one, has left open: to and fro, for such ways go either way.
    for (bool back = false; is_open(0, count); back = !back)
        for (int i = 0; i < windows; i++) {
            const int own = (back ? windows - 1 - i : i) * OWN, begin = max(0, own - AROUND);
            if (!is_open(own, min(own + OWN, count))) continue;
            for (int n = threadIdx.x; n < WINDOW; n += CHOICE_THREADS) {
                const bool there = begin + n < count;
                score[n] = there ? turned[begin + n] : 0, now[n] = there ? all[begin + n] : NONE;
            }
            __syncthreads();
            settle(score, now, begin, count);
            for (int n = threadIdx.x; n < min(WINDOW, count - begin); n += CHOICE_THREADS) all[begin + n] = now[n];
            __syncthreads();
        }
    int *cuts = at<int>(taken) + first * PAGE_CHUNKS, *begins = at<int>(starts) + first * PAGE_CHUNKS, found = 0;
    float* weight = at<float>(weights) + first * PAGE_CHUNKS;
    for (int from = 0; from < count; from += 4 * CHOICE_THREADS) {
        const int n = from + 4 * threadIdx.x;
        u32 own = n < count ? at<u32>((i64)all)[n / 4] & 0x01010101u : 0;
        int more, rank = found + block_prefix(room, __popc(own), more);
        for (; own; own &= own - 1, rank++) {
            cuts[rank] = n + (__ffs(own) - 1) / 8;
            weight[rank] = fmaxf(turned[cuts[rank]], 0);
        }
        found += more;
    }
    __syncthreads();
    const int most = slots / (int)chunk;
    if (found > most) pick(room, weight, [&](int n) { weight[n] = -weight[n]; }, found, 0, 0, most, most);
    __syncthreads();
    if (threadIdx.x == 0) begins[0] = 0;
    int chosen = 1;
    for (int from = 0; from < found; from += CHOICE_THREADS) {
        const int n = from + threadIdx.x;
        int more;
        const bool mine = n < found && (found <= most || __float_as_int(weight[n]) < 0);
        const int rank = chosen + block_rank(room, mine, more);
        if (mine) begins[rank] = cuts[n] + SIDE;
        chosen += more;
    }
    if (threadIdx.x == 0) *cut.count(start, head) = chosen;
}
