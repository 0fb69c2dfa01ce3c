"""By how much scores estimated in few bits pass a limit: all queries with all keys, of which a block of queries and a page leave a number.

Codes of 4 and of 8 bits are bytes here, so that both take the same time: 4 bits are for what a method says, not for speed.
"""
import numpy as np
from numba import carray, cfunc, float32, get_num_threads, int8, int32, njit, uint8
from numba.extending import intrinsic

from edgeattn.kernels_cpu import simd_emit as emit
from edgeattn.kernels_cpu.estimate_bytes import BLOCK, address, round_page, round_query
from edgeattn.kernels_cpu.float_tiles import COLUMNS
from edgeattn.kernels_cpu.floats import F, I
from edgeattn.kernels_cpu.parallel import parallel, worker
from edgeattn.kernels_cpu.simd import at, broadcast_rows, fma, hmax, load, load_tile, outer_dot8, splat, store, u8, vmax
from edgeattn.kernels_cpu.steps import STEP, aligned, as_f32, call
from edgeattn.kernels_cpu.stored_keys import ARGS as KEYS, StoredKeys, expand_page
from edgeattn.page_formats import PAGE

ARGS = ("q", "q.0", "q.1", "q.2", "q_mean", "k_mean", "k_mean.0", "limits", "out", "scale", "levels", *KEYS, "codes", "steps", "starts",
        "floors", "scratch", "scratch.1")
(Q, HEADS, N, DEPTH, Q_MEAN, K_MEAN, KV_HEADS, LIMITS, OUT, SCALE, LEVELS, POOLS, ENTRIES, PAGES, REST, TOKENS, CODES, STEPS, STARTS,
 FLOORS, SCRATCH, SCRATCH_BYTES) = range(len(ARGS))

ROWS = {2: 8, 1: 4}[COLUMNS]  # of a register tile
TILE = ROWS * COLUMNS
RANGE = 64                    # pages of a task
QUERIES = 64                  # tokens of a block of queries
U = u8(64)
NEVER = np.float32(1e30)      # a limit that nothing passes


def score_excess(q, k, q_mean, k_mean, limits, *, scale, bits):
    return run(q, StoredKeys.of(k), q_mean, k_mean, limits, scale, bits)


def run(q: np.ndarray, keys: StoredKeys, q_mean: np.ndarray, k_mean: np.ndarray, limits: np.ndarray, scale: float,
        bits: int) -> np.ndarray:
    """-> [heads, query blocks, pages]"""
    (heads, _, depth), pages, blocks = q.shape, -(-len(keys) // PAGE), -(-q.shape[1] // QUERIES)
    given = {"q": q, "q_mean": q_mean, "k_mean": k_mean, "limits": limits}
    arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in given.items()}
    arrays |= {"out": np.empty((heads, blocks, pages), np.float32), "codes": aligned((heads, blocks, QUERIES * depth), np.int8)}
    kinds = {"steps": np.float32, "starts": np.int32, "floors": np.float32}
    arrays |= {name: aligned((heads, blocks * QUERIES), kind) for name, kind in kinds.items()}
    size = 1024 + depth * (8 + 4 * PAGE + RANGE * PAGE) + 4 * RANGE * PAGE * (1 + heads // len(k_mean))
    arrays["scratch"] = aligned((get_num_threads(), -(-size // 64) * 64), np.uint8)
    call(step, ARGS, arrays | keys.tensors(), {"scale": float(scale), "levels": float({4: 7, 8: 127}[bits])})
    return arrays["out"]


@intrinsic
def row_maxima(typingctx, best, acc, column_scale, scales, floors, first):
    """best[c] = the largest of best[c] and, of all rows r, value(acc[r, c]) * column_scale[c] * scales[first + r] + floors[first + r]; an
    accumulator's value is float(acc - BIAS)."""
    def codegen(context, builder, sig, args):
        n, vec = best.count, best.dtype.ir
        tops, accs, columns = ([builder.extract_value(args[i], j) for j in range(count)] for i, count in ((0, n), (1, acc.count), (2, n)))
        rows, lows = (emit.broadcasts(builder, builder.gep(args[i], [args[5]]), vec, acc.count // n) for i in (3, 4))
        for i, x in enumerate(accs):
            value = builder.fmul(emit.dot_float(builder, x, vec), columns[i % n])
            value = emit.fma(builder, value, rows[i // n], lows[i // n])
            tops[i % n] = builder.select(builder.fcmp_ordered(">", value, tops[i % n]), value, tops[i % n])
        return context.make_tuple(builder, best, tops)
    return best(best, acc, column_scale, scales, floors, first), codegen


@njit(nogil=True, error_model="numpy")
def _scratch(first, depth):
    """Of a thread: a task of page_rows, its parameters, a page, the range's codes, their steps, what mean queries score -> addresses."""
    params = address(first, 128)
    page = address(params, 8 * depth)
    codes = address(page, 4 * PAGE * depth)
    steps = address(codes, RANGE * PAGE * depth)
    return params, page, codes, steps, address(steps, 4 * RANGE * PAGE)


@worker
def round_block(args, rows, first, task, thread):
    """A block of one head's queries: codes [tile of ROWS rows][quad of channels][row], a step for each row; rows behind the last never
    pass."""
    a = carray(args, SCRATCH_BYTES + 1)
    n, depth, blocks = a[N], a[DEPTH], (a[N] + QUERIES - 1) // QUERIES
    head, block = task // blocks, task % blocks
    codes, steps, starts, floors = at(int32, a[CODES]), at(float32, a[STEPS]), at(int32, a[STARTS]), at(float32, a[FLOORS])
    words, levels = a[SCRATCH] + thread * a[SCRATCH_BYTES], as_f32(a[LEVELS])
    for r in range(QUERIES):
        row = block * QUERIES + r
        source, to = head * n + min(row, n - 1), ((task * QUERIES + r) // ROWS * (depth // 4)) * ROWS + r % ROWS
        size, start = round_query(at(float32, a[Q]), source * depth, at(float32, a[Q_MEAN]), head * depth, as_f32(a[SCALE]), depth, levels,
                                  words, codes, to, ROWS)
        steps[task * QUERIES + r], starts[task * QUERIES + r] = size, start
        floors[task * QUERIES + r] = -at(float32, a[LIMITS])[source] if row < n else -NEVER


@njit(nogil=True, error_model="numpy")
def _round_range(a, head, first, last, scratch):
    """Keys of the pages first ... last to the scratch: codes [block of BLOCK tokens][quad of channels][token], a step for each token, and
    what the mean query of each head of the group scores with it, [head][token]."""
    depth, group = a[DEPTH], a[HEADS] // a[KV_HEADS]
    params, page, codes, steps, shared = _scratch(scratch, depth)
    x, means, scores = at(float32, page), at(float32, a[Q_MEAN]), at(float32, shared)
    for p in range(first, last):
        to = (p - first) * PAGE
        count = expand_page(a[POOLS], a[ENTRIES], a[PAGES], a[REST], a[TOKENS], depth, head, p, scratch, params, page)
        round_page(x, at(float32, a[K_MEAN]), head * depth, depth, as_f32(a[LEVELS]), at(int32, codes), to * depth // 4, BLOCK,
                   at(float32, steps), to)
        for member in range(group):
            for half in range(0, PAGE, 16):
                total = splat(F, np.float32(0))
                for c in range(depth):
                    factor = splat(F, means[(head * group + member) * depth + c] * as_f32(a[SCALE]))
                    total = fma(load(F, x, c * PAGE + half), factor, total)
                store(scores, member * RANGE * PAGE + to + half, total)
            for t in range(count, PAGE):
                scores[member * RANGE * PAGE + to + t] = -NEVER


@njit(nogil=True, error_model="numpy")
def _scan(a, task, scratch, member, token):
    """The largest excess of a block's rows with BLOCK tokens of the scratch."""
    depth = a[DEPTH]
    _, _, codes, key_steps, shared = _scratch(scratch, depth)
    keys, rows, starts, quads = at(uint8, codes), at(int8, a[CODES]), at(int32, a[STARTS]), depth // 4
    columns = load_tile(F, COLUMNS, at(float32, key_steps), token, 16)
    lowest = splat(F, -NEVER)
    best = (lowest, lowest) if COLUMNS == 2 else (lowest,)
    for row in range(task * QUERIES, (task + 1) * QUERIES, ROWS):
        acc = broadcast_rows(I, ROWS, COLUMNS, starts, row)
        for s in range(quads):
            acc = outer_dot8(acc, load_tile(U, COLUMNS, keys, token * depth + s * 4 * BLOCK, 64), rows, row * depth + s * 4 * ROWS)
        best = row_maxima(best, acc, columns, at(float32, a[STEPS]), at(float32, a[FLOORS]), row)
    found = splat(F, -NEVER)
    for c in range(COLUMNS):
        found = vmax(found, best[c] + load(F, at(float32, shared), member * RANGE * PAGE + token + 16 * c))
    return hmax(found)


@worker
def scan_range(args, rows, first, task, thread):
    """A range of pages of one KV head, for all its queries."""
    a = carray(args, SCRATCH_BYTES + 1)
    pages, group, blocks = a[PAGES] + (a[TOKENS] + PAGE - 1) // PAGE, a[HEADS] // a[KV_HEADS], (a[N] + QUERIES - 1) // QUERIES
    ranges = (pages + RANGE - 1) // RANGE
    head, begin = task // ranges, task % ranges * RANGE
    last, scratch, out = min(begin + RANGE, pages), a[SCRATCH] + thread * a[SCRATCH_BYTES], at(float32, a[OUT])
    _round_range(a, head, begin, last, scratch)
    for member in range(group):
        for block in range(blocks):
            row = (head * group + member) * blocks + block
            for p in range(last - begin):
                best = _scan(a, row, scratch, member, p * PAGE)
                if COLUMNS == 1:
                    best = max(best, _scan(a, row, scratch, member, p * PAGE + 16))
                out[row * pages + begin + p] = best


@cfunc(STEP, cache=True)
def step(args, state):
    a = carray(args, SCRATCH_BYTES + 1)
    pages = a[PAGES] + (a[TOKENS] + PAGE - 1) // PAGE
    parallel(round_block(), a.ctypes.data, 0, 0, a[HEADS] * ((a[N] + QUERIES - 1) // QUERIES))
    parallel(scan_range(), a.ctypes.data, 0, 0, a[KV_HEADS] * ((pages + RANGE - 1) // RANGE))
