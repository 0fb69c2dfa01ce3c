"""Rotary embedding of a chunk's q or k for what looks at them before attention does: the policies of prefill."""
import numpy as np
from numba import carray, cfunc, float32, int64

from edgeattn.kernels_cpu.attention_write import rotate_head
from edgeattn.kernels_cpu.hadamard import hadamard
from edgeattn.kernels_cpu.parallel import parallel, worker
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import STEP, aligned, call

ARGS = ("x", "x.stride", "x.rows", "cos", "cos.stride", "sin", "positions", "out", "out.0", "out.1", "out.2", "cos.width",
        "interleaved", "turned")
X, X_STRIDE, ROWS_INDEX, COS, COS_STRIDE, SIN, POSITIONS, OUT, HEADS, ROWS, DEPTH, HALF, INTERLEAVED, TURNED = range(len(ARGS))


def run(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, head_dim: int, interleaved: int = 0,
        turned: int = 0) -> np.ndarray:
    """x [tokens, heads * head_dim] float32, rows may lie apart; cos, sin [max_position, rotary_dim / 2]; positions [tokens] int64 ->
    [heads, tokens, head_dim]. turned: also by the matrix that some storages rotate keys by."""
    out = aligned((x.shape[1] // head_dim, len(x), head_dim), np.float32)
    call(step, ARGS, {"x": x, "cos": cos, "sin": sin, "positions": positions, "out": out}, {"interleaved": interleaved, "turned": turned})
    return out


@worker
def rotate_token(a, rows, first, row, thread):
    angle, depth = at(int64, a[POSITIONS])[row] * a[COS_STRIDE], a[DEPTH]
    for head in range(a[HEADS]):
        to = (head * a[ROWS] + row) * depth
        rotate_head(at(float32, a[X]), row * a[X_STRIDE] + head * depth, at(float32, a[COS]), at(float32, a[SIN]), angle, a[HALF],
                    a[INTERLEAVED], depth, np.float32(1), at(float32, a[OUT]), to)
        if a[TURNED]:
            hadamard(at(float32, a[OUT]), to, depth)


@cfunc(STEP, cache=True)
def step(a, state):
    parallel(rotate_token(), carray(a, 1).ctypes.data, 0, 0, state[a[ROWS_INDEX]])
