"""An exported folder's graph: nodes, and initializers as arrays over the memory-mapped weight file."""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from edgeattn.folder import inside


@dataclass
class Graph:
    """`initializers` alias the weight file wherever it holds them: nothing is copied."""
    folder: Path
    proto: onnx.ModelProto
    initializers: dict[str, np.ndarray]
    mapped_bytes: int


def read_graph(folder: Path) -> Graph:
    """ValueError when model.onnx or its data file is missing or cut short, when weights lie outside the folder, or when the file could do
    more than compute: see `_check_nodes`."""
    path = inside(folder, "model.onnx")
    if not path.is_file():
        raise ValueError(f"{folder}: no model.onnx there; give a folder made by `edgeattn export`")
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path}: not a readable ONNX file ({error}); export the model again") from None
    maps: dict[str, np.ndarray] = {}
    try:
        initializers = {tensor.name: _initializer(tensor, folder, maps) for tensor in proto.graph.initializer}
        _check_nodes(proto, initializers)
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        known = str(error).startswith(str(folder))
        raise ValueError(str(error) if known else f"{path}: {' '.join(str(error).split())[:300]}; export the model again") from None
    return Graph(folder, proto, initializers, sum(m.size for m in maps.values()))


def _initializer(tensor: TensorProto, folder: Path, maps: dict[str, np.ndarray]) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if dtype.hasobject or dtype.kind not in "fiub" or min(tensor.dims, default=1) < 0:
        raise ValueError(f"{tensor.name[:80]!r} is a tensor of {dtype} {list(tensor.dims)}, which weights are not")
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    where = {entry.key: entry.value for entry in tensor.external_data}
    name, offset, size = where.get("location", ""), int(where.get("offset", 0)), math.prod(tensor.dims) * dtype.itemsize
    if name not in maps:
        path = inside(folder, name)  # a downloaded folder must not make us read other files
        if not path.is_file():
            raise ValueError(f"{folder}: {name}, the weights of model.onnx, is missing; export the model again")
        maps[name] = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    if offset < 0 or offset % dtype.itemsize:
        raise ValueError(f"{tensor.name[:80]!r} begins at byte {offset} of {name}, where no {dtype} can")
    if offset + size > maps[name].size:
        raise ValueError(f"{folder}: {name} is cut short ({tensor.name} ends at byte {offset + size}, "
                         f"the file at {maps[name].size}); export or copy the model again")
    return maps[name][offset:offset + size].view(dtype).reshape(tuple(tensor.dims))


def _check_nodes(proto, initializers):
    """Names are given once, so that nothing is written where something else lies; nodes hold no graphs (loops never end), name no other
    file's tensors, and functions do not call functions (a few lines would unfold to billions)."""
    for node in proto.graph.node:
        if not all(isinstance(text, str) for text in (node.op_type, node.domain, node.name, *node.input, *node.output)):
            raise ValueError("a name in it is not UTF-8")  # protobuf gives such as bytes
    taken = {value.name for value in proto.graph.input} | set(initializers)
    for node in proto.graph.node:
        for name in filter(None, node.output):
            if name in taken:
                raise ValueError(f"{name[:80]!r} is made more than once")
            taken.add(name)
    ours = {(function.domain, function.name) for function in proto.functions}
    for node in (*proto.graph.node, *(node for function in proto.functions for node in function.node)):
        for a in node.attribute:
            if a.HasField("g") or a.graphs:
                raise ValueError(f"{node.op_type[:80]!r} holds a graph of its own, which is not supported")
            sparse = [part for s in (a.sparse_tensor, *a.sparse_tensors) for part in (s.values, s.indices)]
            if any(t.data_location == TensorProto.EXTERNAL for t in (a.t, *a.tensors, *sparse)):
                raise ValueError(f"{node.op_type[:80]!r} reads a tensor from another file, which is not supported")
    if any((node.domain, node.op_type) in ours for function in proto.functions for node in function.node):
        raise ValueError("a function calls another one, which is not supported")


def attributes(node: onnx.NodeProto) -> dict:
    """A node's attributes as Python values, strings decoded. ValueError: one is of no known kind."""
    try:
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    except ValueError:
        raise ValueError(f"{node.name[:80]!r} has an attribute of no known kind; export the model again") from None
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}
