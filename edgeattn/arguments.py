"""What a kernel's names of arguments mean: the same for every device. See kernels_cpu/steps.py for the list of names."""
from dataclasses import dataclass

import numpy as np

CODES = {"silu": 0, "gelu_tanh": 1, "relu2": 2,
         "bound": 0, "mass": 1, "recency": 2, "random": 3,
         "hierarchy": 10, "representatives": 11, "landmarks": 12, "components": 13, "collisions": 14,
         "peak": 20, "rank": 21, "max_mass": 22,
         "head": 0, "layer": 1, "best": 2}

TYPES = {"float32": 0, "float16": 1, "uint16": 1, "uint8": 2}  # halves come as their bits, too


@dataclass(frozen=True)
class Tensor:
    """Where a value lives. The first dimension may be the name of a count kept in `state`."""
    address: int
    shape: tuple
    stride: int       # elements between rows of the first dimension
    type: str = "float32"

    @staticmethod
    def of(array: np.ndarray, rows: str | None = None) -> "Tensor":
        shape = array.shape if rows is None else (rows, *array.shape[1:])
        stride = array.strides[0] // array.itemsize if array.ndim else 1
        return Tensor(array.ctypes.data, shape, stride, str(array.dtype))


def resolve(args: tuple[str, ...], tensors: dict, attributes: dict, counts: tuple[str, ...], extra: dict) -> list[int]:
    """The int64 arguments that `args` asks for."""
    return [resolve_one(name, tensors, attributes, counts, extra) for name in args]


def resolve_one(name: str, tensors: dict, attributes: dict, counts: tuple[str, ...], extra: dict) -> int:
    if name in extra:
        return int(extra[name])
    if name in attributes:
        value = attributes[name]
        if isinstance(value, (float, np.floating)):
            return int(np.float32(value).view(np.int32))
        return CODES[value] if isinstance(value, str) else int(value)
    tensor_name, _, field = name.partition(".")
    tensor = tensors.get(tensor_name)
    if tensor is None:
        return 0
    if not field:
        return tensor.address
    if field == "rows":
        return counts.index(tensor.shape[0])
    if field == "stride":
        return tensor.stride
    if field == "groups":
        return int(np.prod(tensor.shape[1:-1], dtype=np.int64))
    if field == "width":
        return tensor.shape[-1]
    if field == "type":
        return TYPES[tensor.type]
    return tensor.shape[int(field)]
