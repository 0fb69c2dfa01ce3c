"""out[i, c] = x[i, order[c]]: activations in the order of a weight whose columns are sorted by group (GPTQ's act-order)."""
import numpy as np

from edgeattn.kernels_cuda import compile
from edgeattn.kernels_cuda.steps import Launch, call, ints, pointers

ARGS = ("x", "x.rows", "x.stride", "order", "order.0", "out", "out.stride", "state")
THREADS = 256
BLOCKS = 1024  # beyond which a row is not cut further: one block's elements share its first-level cache


def gather_columns(x, order):
    from edgeattn.kernels_cuda import gather_columns as kernel
    out = np.empty((len(x), len(order)), np.float32)
    call(kernel, dict(x=x, order=order, out=out))
    return out


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    rows = most[a["x.rows"]]
    parts = max(1, min(-(-a["order.0"] // THREADS), BLOCKS // rows))
    args = (*pointers(a, "x", "x.stride", "order", "out", "out.stride", "state"), *ints(a, "x.rows", "order.0"))
    return [Launch(compile.function("gather_columns", "gather_columns"), (rows, parts, 1), THREADS, args, overlap=True)]
