"""An ONNX graph in the making: nodes, and weights that are streamed to model.onnx.data when it is written."""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeattn.exporters.functions import OPSET
from edgeattn.ops import DOMAIN

IR_VERSION = 11       # the first for opset 23
ALIGNMENT = 64        # of every tensor in the data file: one cache line, one AVX-512 register
INLINE_BYTES = 1024   # tensors up to this size stay in model.onnx


@dataclass(frozen=True)
class Spec:
    """An initializer to come."""
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Graph:
    """Collects nodes, inputs and initializers; nothing is read or written before `write`."""

    def __init__(self):
        self.nodes, self.inputs, self.outputs, self.values = [], [], [], []
        self._small = []    # TensorProtos kept in model.onnx
        self._streams = []  # (specs, slabs): slabs() yields tuples of arrays, one array for each spec

    def add(self, op: str, name: str, inputs: list[str], attributes: dict | None = None,
            outputs: int | list[str] = 1, domain: str = DOMAIN):
        """Add a node. `outputs` is how many (named after the node) or their names; returns one name, or the list of several."""
        if isinstance(outputs, int):
            outputs = [f"{name}.out"] if outputs == 1 else [f"{name}.out{i}" for i in range(outputs)]
        inputs = [i or "" for i in inputs]
        while inputs and not inputs[-1]:  # absent trailing inputs are left out
            inputs.pop()
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **(attributes or {})))
        return outputs[0] if len(outputs) == 1 else outputs

    def value(self, name: str, array: np.ndarray) -> str:
        """An initializer that is small enough to be in memory already."""
        if array.nbytes <= INLINE_BYTES:
            self._small.append(numpy_helper.from_array(array, name))
        else:
            self.stream([Spec(name, array.dtype.name, array.shape)], lambda: iter([(array,)]))
        return name

    def stream(self, specs: list[Spec], slabs: Callable[[], Iterator[tuple[np.ndarray, ...]]]) -> None:
        """Initializers that are made piece by piece: each item of slabs() holds the next bytes of every one of `specs`."""
        self._streams.append((specs, slabs))

    def write(self, folder: Path, functions: list[onnx.FunctionProto], progress: Callable[[int, int], None] | None = None) -> None:
        """Write model.onnx and model.onnx.data. progress(bytes written, bytes in all)."""
        offsets, end, total = {}, 0, 0
        for spec in (spec for specs, _ in self._streams for spec in specs):
            total += spec.nbytes
            offsets[spec.name] = end
            end = _round_up(end + spec.nbytes)
        with open(folder / "model.onnx.data", "wb") as file:
            file.truncate(end)
            done = 0
            for specs, slabs in self._streams:
                for count in _write_stream(file, specs, offsets, slabs):
                    done += count
                    if progress:
                        progress(done, total)
        tensors = [_external(spec, offsets[spec.name]) for specs, _ in self._streams for spec in specs]
        onnx.save(self._model(tensors, functions), folder / "model.onnx")

    def _model(self, tensors, functions):
        graph = helper.make_graph(self.nodes, "decoder", self.inputs, self.outputs, self._small + tensors, value_info=self.values)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgeattn")


def tensor_info(name: str, dtype: int, shape: list) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _round_up(size):
    return -(-size // ALIGNMENT) * ALIGNMENT


def _write_stream(file, specs, offsets, slabs):
    cursors = [offsets[spec.name] for spec in specs]
    for arrays in slabs():
        for i, (spec, array) in enumerate(zip(specs, arrays, strict=True)):
            assert array.dtype == spec.dtype, f"{spec.name}: planned as {spec.dtype}, made as {array.dtype}"
            file.seek(cursors[i])
            file.write(np.ascontiguousarray(array).data)
            cursors[i] += array.nbytes
        yield sum(array.nbytes for array in arrays)
    for spec, cursor in zip(specs, cursors):
        assert cursor == offsets[spec.name] + spec.nbytes, f"{spec.name}: {spec.nbytes} bytes planned, {cursor - offsets[spec.name]} made"


def _external(spec, offset):
    tensor = TensorProto(name=spec.name, dims=spec.shape, data_type=helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype)),
                         data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", spec.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
