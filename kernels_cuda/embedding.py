"""Rows of an embedding table, float32 or float16, as float32: gather_rows under the names of a table."""
import numpy as np

from edgeattn.kernels_cuda import gather_rows
from edgeattn.kernels_cuda.steps import Launch, call

NAMES = {"x": "weight", "x.stride": "weight.stride", "x.width": "weight.width", "x.type": "weight.type",
         "indices": "ids", "indices.rows": "ids.rows"}
ARGS = tuple(NAMES.get(name, name) for name in gather_rows.ARGS)


def embedding(ids, weight):
    from edgeattn.kernels_cuda import embedding as kernel
    out = np.empty((len(ids), weight.shape[1]), np.float32)
    call(kernel, dict(ids=ids, weight=weight, out=out))
    return out


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    return gather_rows.launches({name: a[NAMES.get(name, name)] for name in gather_rows.ARGS}, most)
