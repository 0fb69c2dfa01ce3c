"""An exported folder's graph: nodes, and initializers as arrays over the memory-mapped weight file."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper


@dataclass
class Graph:
    """`initializers` alias the weight file wherever it holds them: nothing is copied."""
    folder: Path
    proto: onnx.ModelProto
    initializers: dict[str, np.ndarray]
    mapped_bytes: int


def read_graph(folder: Path) -> Graph:
    """ValueError when model.onnx or its data file is missing or cut short."""
    path = folder / "model.onnx"
    if not path.is_file():
        raise ValueError(f"{folder}: no model.onnx there; give a folder made by `edgeattn export`")
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path}: not a readable ONNX file ({error}); export the model again") from None
    maps: dict[str, np.ndarray] = {}
    initializers = {tensor.name: _initializer(tensor, folder, maps) for tensor in proto.graph.initializer}
    return Graph(folder, proto, initializers, sum(m.size for m in maps.values()))


def _initializer(tensor: TensorProto, folder: Path, maps: dict[str, np.ndarray]) -> np.ndarray:
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    name, offset = where["location"], int(where.get("offset", 0))
    if name not in maps:
        if Path(name).name != name:  # a downloaded folder must not make us read other files
            raise ValueError(f"{folder / 'model.onnx'}: the weights' location must be a file of the same folder, got {name!r}; "
                             "export the model again")
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name}, the weights of model.onnx, is missing; export the model again")
        maps[name] = np.memmap(folder / name, np.uint8, mode="r")
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    size = int(np.prod(tensor.dims, dtype=np.int64)) * dtype.itemsize
    if offset + size > maps[name].size:
        raise ValueError(f"{folder}: {name} is cut short ({tensor.name} ends at byte {offset + size}, "
                         f"the file at {maps[name].size}); export or copy the model again")
    return maps[name][offset:offset + size].view(dtype).reshape(tuple(tensor.dims))


def attributes(node: onnx.NodeProto) -> dict:
    """A node's attributes as Python values, strings decoded."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
