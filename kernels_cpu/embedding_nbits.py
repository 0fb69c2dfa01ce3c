"""Rows of a block-quantised table; see the reference."""
import numpy as np
from numba import carray, cfunc, njit

from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.simd import f32, hsum, load_half
from edgeattn.kernels_cpu.steps import STEP, WIDTH, aligned, call, f32_at, i64_at, u8_at, u16_at

ARGS = ("ids", "ids.rows", "codes", "scales", "zero_points", "out", "out.stride", "bits", "block_size", "K", "N")
(IDS, ROWS, CODES, SCALES, ZERO_POINTS, OUT, OUT_STRIDE, BITS, BLOCK_SIZE, K, N) = range(len(ARGS))
CHUNK = 8  # tokens of a task
F1 = f32(1)


def embedding_nbits(ids, codes, scales, zero_points=None, *, bits, block_size, K, N):
    out = aligned((len(ids), K), np.float32)
    tensors = dict(ids=ids, codes=codes, scales=scales.view(np.uint16), zero_points=zero_points, out=out)
    call(step, ARGS, tensors, dict(bits=bits, block_size=block_size, K=K, N=N))
    return out


@njit(nogil=True, error_model="numpy")
def _row(weights, row, bits, size, k, has_zeros, out, at):
    """Row `row` of the table to out[at : at + k]."""
    codes, scales, zero_points = weights
    blocks, step_k = (k + size - 1) // size, 32 // bits  # K of the 4 bytes that a step of a block holds for a row
    for b in range(blocks):
        block = row // 16 * blocks + b
        scale = hsum(load_half(F1, scales, block * 16 + row % 16))
        zero = np.int32(zero_points[block * 16 + row % 16]) if has_zeros else np.int32(1) << np.int32(bits - 1)
        first = block * (size // step_k) * 64 + row % 16 * 4
        for i in range(min(size, k - b * size)):
            byte = codes[first + i // step_k * 64 + i % step_k * bits // 8]
            code = byte if bits == 8 else (byte >> 4 if i & 1 else byte & 15)
            out[at + b * size + i] = np.float32(np.int32(code) - zero) * scale


@worker
def gather(a, rows, _, chunk, thread):
    args = carray(a, WIDTH)
    size, k = args[BLOCK_SIZE], args[K]
    n = (args[N] + 15) // 16 * ((k + size - 1) // size) * 16
    weights = u8_at(args[CODES], n * size * args[BITS] // 8), u16_at(args[SCALES], n), u8_at(args[ZERO_POINTS], n)
    ids, out = i64_at(args[IDS], rows), f32_at(args[OUT], rows * args[OUT_STRIDE])
    for r in range(chunk * CHUNK, min(rows, chunk * CHUNK + CHUNK)):
        _row(weights, ids[r], args[BITS], size, k, args[ZERO_POINTS] != 0, out, r * args[OUT_STRIDE])


@njit(nogil=True, error_model="numpy")
def _run(args, rows):
    if rows <= CHUNK:
        call_worker(gather(), args, rows, 0, 0, 0)
    else:
        parallel(gather(), args, rows, 0, (rows + CHUNK - 1) // CHUNK)


@cfunc(STEP, cache=True)
def step(a, state):
    _run(carray(a, WIDTH).ctypes.data, state[a[ROWS]])
