"""Rows of a block-quantised table; see the reference."""
import numpy as np
from numba import carray, cfunc, float32, int64, njit, uint8, uint16

from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.simd import at, f32, hsum, load_half
from edgeattn.kernels_cpu.steps import STEP, TYPES, WIDTH, aligned, call

ARGS = ("ids", "ids.rows", "codes", "scales", "zero_points", "zero_points.type", "out", "out.stride", "bits", "block_size", "K")
(IDS, ROWS, CODES, SCALES, ZERO_POINTS, ZERO_TYPE, OUT, OUT_STRIDE, BITS, BLOCK_SIZE, K) = range(len(ARGS))
BYTES, HALVES, NONE = TYPES["uint8"], TYPES["float16"], -1
CHUNK = 8  # tokens of a task
F1 = f32(1)


def embedding_nbits(ids, codes, scales, zero_points=None, *, bits, block_size, K, N):
    out = aligned((len(ids), K), np.float32)
    zero_points = zero_points.view(np.uint16) if zero_points is not None and zero_points.dtype == np.float16 else zero_points
    tensors = dict(ids=ids, codes=codes, scales=scales.view(np.uint16), zero_points=zero_points, out=out)
    call(step, ARGS, tensors, dict(bits=bits, block_size=block_size, K=K, N=N))
    return out


@njit(nogil=True, error_model="numpy")
def _code(codes, first, i, size, bits):
    """Code i of a block whose bytes of one row start at `first`, four of them to a step of 64."""
    if bits == 3:  # two bits as below, the third behind them: bit c + 4 * h of byte j of step t for i = 32 * t + 16 * h + 4 * j + c
        third = codes[first + size // 16 * 64 + i // 32 * 64 + i // 4 % 4] >> (i % 4 + i // 16 % 2 * 4) & 1
        return np.int32(codes[first + i // 16 * 64 + i // 4 % 4] >> (i % 4 * 2) & 3 | third << 2)
    step_k = 32 // bits
    byte = codes[first + i // step_k * 64 + i % step_k * bits // 8]
    return np.int32(byte >> (i * bits % 8) & ((1 << bits) - 1))


@njit(nogil=True, error_model="numpy")
def _row(weights, row, bits, size, k, zero_type, out, to):
    """Row `row` of the table to out[to : to + k]."""
    codes, scales, zero_points = weights
    blocks = (k + size - 1) // size
    for b in range(blocks):
        block = row // 16 * blocks + b
        place = block * 16 + row % 16
        scale, zero = hsum(load_half(F1, scales, place)), np.float32(1 << (bits - 1))
        if zero_type == BYTES:
            zero = np.float32(zero_points[place])
        elif zero_type == HALVES:
            zero = hsum(load_half(F1, zero_points, 2 * place))
        first = block * size * bits * 2 + row % 16 * 4
        for i in range(min(size, k - b * size)):
            out[to + b * size + i] = (np.float32(_code(codes, first, i, size, bits)) - zero) * scale


@worker
def gather(a, rows, _, chunk, thread):
    size, k = a[BLOCK_SIZE], a[K]
    weights = at(uint8, a[CODES]), at(uint16, a[SCALES]), at(uint8, a[ZERO_POINTS])
    ids, out, zero_type = at(int64, a[IDS]), at(float32, a[OUT]), a[ZERO_TYPE] if a[ZERO_POINTS] else NONE
    for r in range(chunk * CHUNK, min(rows, chunk * CHUNK + CHUNK)):
        _row(weights, ids[r], a[BITS], size, k, zero_type, out, r * a[OUT_STRIDE])


@njit(nogil=True, error_model="numpy")
def _run(args, rows):
    if rows <= CHUNK:
        call_worker(gather(), args, rows, 0, 0, 0)
    else:
        parallel(gather(), args, rows, 0, (rows + CHUNK - 1) // CHUNK)


@cfunc(STEP, cache=True)
def step(a, state):
    _run(carray(a, WIDTH).ctypes.data, state[a[ROWS]])
