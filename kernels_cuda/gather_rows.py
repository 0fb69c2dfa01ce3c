"""out[i] = x[indices[i]], row by row, as float32."""
import numpy as np

from edgeattn.kernels_cuda import compile
from edgeattn.kernels_cuda.steps import Launch, call, ints, pointers

ARGS = ("x", "x.stride", "x.width", "indices", "indices.rows", "out", "out.stride", "x.type", "state")
THREADS = 256


def gather_rows(x, indices):
    from edgeattn.kernels_cuda import gather_rows as kernel
    out = np.empty((len(indices), x.shape[1]), np.float32)
    call(kernel, dict(x=x, indices=indices, out=out))
    return out


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    args = (*pointers(a, "x", "x.stride"), *ints(a, "x.type"), *pointers(a, "indices", "out", "out.stride", "state"),
            *ints(a, "indices.rows", "x.width"))
    grid = most[a["indices.rows"]], -(-a["x.width"] // THREADS), 1
    return [Launch(compile.function("gather_rows", "gather_rows"), grid, THREADS, args, overlap=True)]
