"""activation(gate) * up, where each row of x is gate then up."""
import numpy as np

from edgeattn.kernels_cuda import compile
from edgeattn.kernels_cuda.steps import Launch, call, ints, pointers

ARGS = ("x", "x.rows", "x.stride", "x.width", "out", "out.stride", "activation", "state")
THREADS = 256


def gated_activation(x, *, activation):
    from edgeattn.kernels_cuda import gated_activation as kernel
    out = np.empty((len(x), x.shape[1] // 2), np.float32)
    call(kernel, dict(x=x, out=out), dict(activation=activation))
    return out


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    width = a["x.width"] // 2
    args = (*pointers(a, "x", "x.stride", "out", "out.stride", "state"), *ints(a, "x.rows"), np.int32(width), *ints(a, "activation"))
    grid = most[a["x.rows"]], -(-width // THREADS), 1
    return [Launch(compile.function("gated_activation", "gated_activation"), grid, THREADS, args, overlap=True)]
