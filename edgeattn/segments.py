"""The general fallback: nodes that no kernel knows run in ONNX Runtime, between our own steps, over the same buffers."""
import math

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from edgeattn.batch import COUNTS
from edgeattn.graph import Graph

LARGEST = 1 << 26  # elements that a token may have between nodes


class Segment:
    """Consecutive unknown nodes as one onnxruntime session.

    `outputs` are (name, dtype, shape) of what the rest of the graph reads; dimensions are ints or names of counts.
    """

    def __init__(self, graph: Graph, nodes: list, known: dict, wanted: set[str]):
        """known: {name: (dtype, shape)} of values made before; wanted: names read afterwards."""
        made = {name for node in nodes for name in node.output if name}
        read = {name for node in nodes for name in node.input if name}
        self.inputs = sorted((read - made) & set(known))
        constants = [numpy_helper.from_array(np.ascontiguousarray(graph.initializers[name]), name)
                     for name in sorted((read - made) & set(graph.initializers))]

        def describe(name):
            dtype, shape = known[name]
            return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
        body = helper.make_graph(nodes, "segment", [describe(name) for name in self.inputs], [], constants,
                                 value_info=[v for v in graph.proto.graph.value_info if v.name in made])
        proto = helper.make_model(body, opset_imports=list(graph.proto.opset_import), functions=list(graph.proto.functions),
                                  ir_version=graph.proto.ir_version)
        try:
            inferred = {v.name: v for v in shape_inference.infer_shapes(proto).graph.value_info}
        except Exception as error:  # the library's own
            raise _refused(graph, nodes, error) from None
        large = [name for name, value in inferred.items() if _elements(value) > LARGEST]
        if large:
            raise ValueError(f"{graph.folder}: {large[0]!r}, made by {nodes[0].op_type}, is too large to compute")
        self.outputs = []
        for name in sorted(made & wanted):
            if name not in inferred or not _usable(inferred[name]):
                raise ValueError(f"{graph.folder}: cannot tell the shape of {name!r}, made by {nodes[0].op_type}; "
                                 "give the graph a value_info for it")
            proto.graph.output.append(inferred[name])
            self.outputs.append((name, *_described(inferred[name])))
        self._graph, self._nodes = graph, nodes
        self._proto, self._session = proto.SerializeToString(), None

    def connect(self, views: dict) -> None:
        """views: {name: function of the counts -> NumPy view}, for inputs and outputs. Opens the session."""
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # our own threads wait nearby
        options.log_severity_level = 4  # what it has to say is in the error
        try:
            self._session = onnxruntime.InferenceSession(self._proto, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's own
            raise _refused(self._graph, self._nodes, error) from None
        self._views = views
        self._proto = None

    def run(self, state: np.ndarray) -> None:
        feeds = {name: self._views[name](state) for name in self.inputs}
        try:
            results = self._session.run([name for name, _, _ in self.outputs], feeds)
        except Exception as error:
            raise _refused(self._graph, self._nodes, error) from None
        for (name, _, _), result in zip(self.outputs, results):
            self._views[name](state)[...] = result


def _refused(graph, nodes, error):
    return ValueError(f"{graph.folder}: onnxruntime cannot run {nodes[0].op_type}: {' '.join(str(error).split())[:300]}")


def _elements(value):
    """Of a value, those of one token."""
    return math.prod(max(d.dim_value, 1) for d in value.type.tensor_type.shape.dim)


def _usable(value):
    """Rows of numbers, of a known shape."""
    tensor = value.type.tensor_type
    if not tensor.elem_type or helper.tensor_dtype_to_np_dtype(tensor.elem_type).kind not in "fiub":
        return False
    first, *rest = _described(value)[1] or [0]
    return (first in COUNTS or isinstance(first, int) and first > 0) and all(isinstance(n, int) and n > 0 for n in rest)


def _described(value: onnx.ValueInfoProto) -> tuple[np.dtype, tuple]:
    tensor = value.type.tensor_type
    shape = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return helper.tensor_dtype_to_np_dtype(tensor.elem_type), shape
