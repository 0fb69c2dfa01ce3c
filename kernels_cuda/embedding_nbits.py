"""Rows of a block-quantised table; see the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile
from edgeattn.kernels_cuda.matmul_nbits import HALVES
from edgeattn.kernels_cuda.steps import Launch, call, ints, pointers

ARGS = ("ids", "ids.rows", "codes", "scales", "zero_points", "out", "out.stride", "bits", "block_size", "K", "N", "state",
        "zero_points.type")
THREADS = 128


def embedding_nbits(ids, codes, scales, zero_points=None, *, bits, block_size, K, N):
    from edgeattn.kernels_cuda import embedding_nbits as kernel
    out = np.empty((len(ids), K), np.float32)
    tensors = dict(ids=ids, codes=codes, scales=scales.view(np.uint16), zero_points=zero_points, out=out)
    call(kernel, tensors, dict(bits=bits, block_size=block_size, K=K, N=N))
    return out


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    args = (*pointers(a, "ids", "codes", "scales", "zero_points", "out", "out.stride", "state"), *ints(a, "ids.rows", "bits",
            "block_size", "K"), np.int32(a["zero_points.type"] == HALVES))
    grid = most[a["ids.rows"]], -(-a["K"] * a["bits"] // (32 * THREADS)), 1
    return [Launch(compile.function("embedding_nbits", "embedding_nbits"), grid, THREADS, args, overlap=True)]
