"""Softmax weights of pages for blocks of queries, estimated from antidiagonals in 8 bits: one product of width stride * head_dim.

Keys are taken a range of pages at a time, each by one task, rounded into scratch that stays in the cache, and multiplied with all rows of
their KV head's queries. A range's softmax is relative to its own largest score; what the ranges found is put together at the end. Columns,
strides of keys, stand so that lane p of a vector belongs to page p of 16: sums over a page are then sums of vectors.
"""
import numpy as np
from numba import carray, cfunc, float32, get_num_threads, int32, int8, njit, uint8

from edgeattn.kernels_cpu.estimate_bytes import BLOCK, address, round_page, round_query
from edgeattn.kernels_cpu.float_tiles import COLUMNS
from edgeattn.kernels_cpu.floats import F, I, exp_low, lane_numbers, where_less
from edgeattn.kernels_cpu.parallel import parallel, worker
from edgeattn.kernels_cpu.simd import (at, broadcast_rows, fma, hmax, hsum, load, load_tile, outer_dot8, outer_fma, splat, store,
                                       store_tile, u8, vmax, zeros)
from edgeattn.kernels_cpu.steps import STEP, aligned, as_f32, call
from edgeattn.kernels_cpu.stored_keys import ARGS as KEYS, StoredKeys, expand_page
from edgeattn.page_formats import PAGE

ARGS = ("q", "q.0", "q.1", "q.2", "mean", "mean.0", "out", "scale", "stride", *KEYS, "codes", "codes.1", "steps", "starts", "edges",
        "weights", "tops", "tops.2", "totals", "scratch", "scratch.1")
(Q, HEADS, N, DEPTH, MEAN, KV_HEADS, OUT, SCALE, STRIDE, POOLS, ENTRIES, PAGES, REST, TOKENS, CODES, TILES, STEPS, STARTS, EDGES, WEIGHTS,
 TOPS, RANGES, TOTALS, SCRATCH, SCRATCH_BYTES) = range(len(ARGS))

ROWS = 6              # of a register tile: their sums in floats and in integers are in registers at once
RANGE = 64            # pages of a task
TILE = ROWS * COLUMNS
QUERIES = 64          # tokens of a block of queries
U = u8(64)
LOWEST = np.float32(-1e30)


def antidiagonal_weights(q, k, mean, *, scale, stride):
    return run(q, StoredKeys.of(k), mean, scale, stride)


def run(q: np.ndarray, keys: StoredKeys, mean: np.ndarray, scale: float, stride: int) -> np.ndarray:
    """-> [heads, query blocks, pages]"""
    (heads, n, depth), kv_heads, pages = q.shape, len(mean), -(-len(keys) // PAGE)
    tiles, ranges = -(-(heads // kv_heads * -(-n // stride)) // ROWS), -(-pages // RANGE)
    rows = tiles * ROWS
    arrays = {"q": q, "mean": mean, "out": aligned((heads, -(-n // QUERIES), ranges * RANGE), np.float32),
              "codes": aligned((kv_heads, tiles, ROWS * stride * depth), np.int8), "steps": aligned((kv_heads, rows * stride), np.float32),
              "starts": aligned((kv_heads, rows * stride), np.int32), "edges": aligned((kv_heads, rows, 2), np.float32),
              "weights": aligned((kv_heads, rows, ranges * RANGE), np.float32), "tops": aligned((kv_heads, rows, ranges), np.float32),
              "totals": aligned((kv_heads, rows, ranges), np.float32)}
    size = 1024 + depth * (8 + 5 * PAGE + RANGE * PAGE) + 4 * PAGE + 4 * RANGE * PAGE + 4 * ROWS * RANGE * PAGE // stride
    arrays["scratch"] = aligned((get_num_threads(), -(-size // 64) * 64), np.uint8)
    for name in ("q", "mean"):
        arrays[name] = np.ascontiguousarray(arrays[name], np.float32)
    call(step, ARGS, arrays | keys.tensors(), {"scale": float(scale), "stride": stride})
    return arrays["out"][..., :pages]


@njit(nogil=True, error_model="numpy")
def _scratch(first, depth):
    """Addresses, after a task of page_rows: its parameters, a page, its codes, its steps, the range's codes, their steps, scores."""
    params = address(first, 128)
    page = address(params, 8 * depth)
    words = address(page, 4 * PAGE * depth)
    steps = address(words, PAGE * depth)
    codes = address(steps, 4 * PAGE)
    code_steps = address(codes, RANGE * PAGE * depth)
    return params, page, words, steps, codes, code_steps, address(code_steps, 4 * RANGE * PAGE)


@njit(nogil=True, error_model="numpy")
def _row(a, row):
    """-> (query head of the group, the row's stride of queries)"""
    strides = (a[N] + a[STRIDE] - 1) // a[STRIDE]
    return row // strides, row % strides


@njit(nogil=True, error_model="numpy")
def _dot(a, x, b, y, depth):
    total = splat(F, np.float32(0))
    for c in range(0, depth, 16):
        total = fma(load(F, a, x + c), load(F, b, y + c), total)
    return hsum(total)


@njit(nogil=True, error_model="numpy")
def _edges(a, head, member, u, to):
    """The two strides of keys of which a row may see a part: exact means of the pairs that it sees, less what the mean key takes from all
    other scores of the row."""
    n, depth, stride, past = a[N], a[DEPTH], a[STRIDE], a[PAGES] * PAGE + a[TOKENS] - a[N]
    q, rest, mean = at(float32, a[Q]), at(float32, a[REST]), at(float32, a[MEAN])
    first, shift = (head * (a[HEADS] // a[KV_HEADS]) + member) * n, np.float32(0)
    for t in range(stride):
        shift += _dot(q, (first + min(u * stride + t, n - 1)) * depth, mean, head * depth, depth)
    for e in range(2):
        w = min((past + u * stride) // stride + e, (past + n - 1) // stride)
        total, count = np.float32(0), 0
        for t in range(stride):
            i, j = min(u * stride + stride - 1 - t, n - 1), w * stride + t
            if j <= past + i:
                count += 1
                total += _dot(q, (first + i) * depth, rest, (head * a[TOKENS] + j - a[PAGES] * PAGE) * depth, depth)
        score = (total / np.float32(max(count, 1)) - shift / np.float32(stride)) * as_f32(a[SCALE])
        to[e] = score if count else np.float32(-np.inf)


@worker
def round_rows(args, rows, first, task, thread):
    """A tile of rows: their codes, and their exact scores at the causal mask's edge."""
    a = carray(args, SCRATCH_BYTES + 1)
    tiles, depth, stride, n, group = a[TILES], a[DEPTH], a[STRIDE], a[N], a[HEADS] // a[KV_HEADS]
    head, tile = task // tiles, task % tiles
    codes, steps, starts = at(int32, a[CODES]), at(float32, a[STEPS]), at(int32, a[STARTS])
    scratch = a[SCRATCH] + thread * a[SCRATCH_BYTES]
    _, page, words, _, _, _, _ = _scratch(scratch, depth)
    nothing = at(float32, page)
    for c in range(depth):
        nothing[c] = 0
    for r in range(ROWS):
        member, u = _row(a, tile * ROWS + r)
        if member < group:
            _edges(a, head, member, u, at(float32, a[EDGES] + 8 * (task * ROWS + r)))
        for t in range(stride):
            to = task * stride + t
            if member < group:
                source = ((head * group + member) * n + min(u * stride + stride - 1 - t, n - 1)) * depth
                size, start = round_query(at(float32, a[Q]), source, nothing, 0, np.float32(1), depth, np.float32(127), words, codes,
                                          to * depth // 4 * ROWS + r, ROWS)
                steps[to * ROWS + r], starts[to * ROWS + r] = size * (as_f32(a[SCALE]) / np.float32(stride)), start
            else:
                for s in range(depth // 4):
                    codes[(to * depth // 4 + s) * ROWS + r] = 0
                steps[to * ROWS + r], starts[to * ROWS + r] = np.float32(0), np.int32(0)


@njit(nogil=True, error_model="numpy")
def _round_range(a, head, first, last, scratch):
    """Keys of the pages first ... last to the scratch: codes [block of BLOCK strides][token of a stride][quad of channels][stride], and a
    step for each token."""
    depth, stride = a[DEPTH], a[STRIDE]
    params, page, words, steps, codes, code_steps, _ = _scratch(scratch, depth)
    x, word, size, quads = at(float32, page), at(int32, words), at(float32, steps), depth // 4
    out, sizes = at(int32, codes), at(float32, code_steps)
    for p in range(first, last):
        expand_page(a[POOLS], a[ENTRIES], a[PAGES], a[REST], a[TOKENS], depth, head, p, scratch, params, page)
        round_page(x, at(float32, a[MEAN]), head * depth, depth, np.float32(127), word, 0, PAGE, size, 0)
        for j in range(PAGE):
            vector = (p - first) // 16 * (PAGE // stride) + j // stride
            to, lane = vector // COLUMNS * stride + j % stride, vector % COLUMNS * 16 + (p - first) % 16
            sizes[to * BLOCK + lane] = size[j]
            for s in range(quads):
                out[(to * quads + s) * BLOCK + lane] = word[s * PAGE + j]


@njit(nogil=True, error_model="numpy")
def _score(a, task, scratch, depth, stride, columns):
    """Scores of a tile of rows with `columns` strides of keys."""
    _, _, _, _, codes, code_steps, scores = _scratch(scratch, depth)
    keys, key_steps, out, quads = at(uint8, codes), at(float32, code_steps), at(float32, scores), depth // 4
    rows, row_steps, starts = at(int8, a[CODES]), at(float32, a[STEPS]), at(int32, a[STARTS])
    for i in range(0, columns, BLOCK):
        total = zeros(F, TILE)
        for t in range(stride):
            acc = broadcast_rows(I, ROWS, COLUMNS, starts, (task * stride + t) * ROWS)
            column, row = (i // BLOCK * stride + t) * quads, (task * stride + t) * quads
            for s in range(quads):
                v = load_tile(U, COLUMNS, keys, (column + s) * 4 * BLOCK, 64)
                acc = outer_dot8(acc, v, rows, (row + s) * 4 * ROWS)
            total = outer_fma(total, acc, load_tile(F, COLUMNS, key_steps, (i // BLOCK * stride + t) * BLOCK, 16), row_steps,
                              (task * stride + t) * ROWS)
        store_tile(out, i, RANGE * PAGE // stride, 16, COLUMNS, total)


@njit(nogil=True, error_model="numpy")
def _hide(scores, base, last, first, vectors, each):
    """-inf for strides behind stride `last`. Vector i has stride i % each of 16 pages, from page first + 16 * (i // each) on."""
    for i in range(vectors):
        beyond = (last - i % each) // each + 1 - first - i // each * 16  # lanes from here on are hidden
        if beyond < 16:
            x = load(F, scores, base + 16 * i)
            store(scores, base + 16 * i, where_less(lane_numbers(I), splat(I, np.int32(beyond)), x, splat(F, np.float32(-np.inf))))


@njit(nogil=True, error_model="numpy")
def _soften(scores, base, vectors, each, out, to):
    """A row's weights by page, relative to its largest score here -> that score, their sum."""
    best = splat(F, LOWEST)
    for i in range(vectors):
        best = vmax(best, load(F, scores, base + 16 * i))
    top, total = splat(F, hmax(best)), splat(F, np.float32(0))
    for g in range(vectors // each):
        page = splat(F, np.float32(0))
        for i in range(g * each, (g + 1) * each):
            page += exp_low(load(F, scores, base + 16 * i) - top)
        store(out, to + 16 * g, page)
        total += page
    return hmax(best), hsum(total)


@worker
def weigh_range(args, rows, first, task, thread):
    """A range of pages of one KV head, for all its rows."""
    a = carray(args, SCRATCH_BYTES + 1)
    tiles, ranges, depth, stride, group = a[TILES], a[RANGES], a[DEPTH], a[STRIDE], a[HEADS] // a[KV_HEADS]
    head, part, each, past = task // ranges, task % ranges, PAGE // stride, a[PAGES] * PAGE + a[TOKENS] - a[N]
    begin = part * RANGE
    last = min(begin + RANGE, (past + a[N] + PAGE - 1) // PAGE)
    scratch = a[SCRATCH] + thread * a[SCRATCH_BYTES]
    _round_range(a, head, begin, last, scratch)
    vectors = (last - begin + 15) // 16 * each
    columns, row_gap = (vectors + COLUMNS - 1) // COLUMNS * BLOCK, RANGE * PAGE // stride
    scores, edges, weights = at(float32, _scratch(scratch, depth)[6]), at(float32, a[EDGES]), at(float32, a[WEIGHTS])
    tops, totals = at(float32, a[TOPS]), at(float32, a[TOTALS])
    for tile in range(tiles):
        _score(a, head * tiles + tile, scratch, depth, stride, columns)
        for r in range(ROWS):
            member, u = _row(a, tile * ROWS + r)
            row = (head * tiles + tile) * ROWS + r
            if member >= group:
                continue
            if last * each > (past + u * stride) // stride:  # the first stride of which the row may see a part
                final = (past + min(u * stride + stride, a[N]) - 1) // stride
                _hide(scores, r * row_gap, final, begin, vectors, each)
                for e in range(2):
                    w = min((past + u * stride) // stride + e, (past + a[N] - 1) // stride)
                    page = w // each - begin
                    if 0 <= page < last - begin:
                        scores[r * row_gap + (page // 16 * each + w % each) * 16 + page % 16] = edges[2 * row + e]
            top, total = _soften(scores, r * row_gap, vectors, each, weights, (row * ranges + part) * RANGE)
            tops[row * ranges + part], totals[row * ranges + part] = top, total


@worker
def join_ranges(args, rows, first, task, thread):
    """A block of queries of one head: the sums over its rows, each of all ranges together."""
    a = carray(args, SCRATCH_BYTES + 1)
    tiles, ranges, stride, group, blocks = a[TILES], a[RANGES], a[STRIDE], a[HEADS] // a[KV_HEADS], (a[N] + QUERIES - 1) // QUERIES
    head, block = task // blocks, task % blocks
    strides, each = (a[N] + stride - 1) // stride, QUERIES // stride
    out, weights = at(float32, a[OUT] + 4 * task * ranges * RANGE), at(float32, a[WEIGHTS])
    tops, totals = at(float32, a[TOPS]), at(float32, a[TOTALS])
    for u in range(block * each, min(strides, (block + 1) * each)):
        row = (head // group * tiles * ROWS + head % group * strides + u) * ranges
        best, total = LOWEST, np.float32(0)
        for i in range(row, row + ranges):
            best = max(best, tops[i])
        for i in range(row, row + ranges):
            total += totals[i] * hmax(exp_low(splat(F, tops[i] - best)))
        for i in range(row, row + ranges):
            factor = splat(F, hmax(exp_low(splat(F, tops[i] - best))) / total)
            for p in range(0, RANGE, 16):
                to = (i - row) * RANGE + p
                store(out, to, fma(load(F, weights, i * RANGE + p), factor, load(F, out, to)))


@cfunc(STEP, cache=True)
def step(args, state):
    a = carray(args, SCRATCH_BYTES + 1)
    parallel(round_rows(), a.ctypes.data, 0, 0, a[KV_HEADS] * a[TILES])
    parallel(weigh_range(), a.ctypes.data, 0, 0, a[KV_HEADS] * a[RANGES])
    parallel(join_ranges(), a.ctypes.data, 0, 0, a[HEADS] * ((a[N] + QUERIES - 1) // QUERIES))
