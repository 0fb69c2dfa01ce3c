"""An exported graph as a flat list of native steps over preallocated buffers.

Every node becomes a step of one operator, a view (Split, Reshape: no work at all), or part of an onnxruntime segment. Consecutive
steps form one table, which a backend makes and runs (backend_cpu.py, backend_cuda.py): between operators no Python runs.
"""
import math
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np

from edgeattn.arena import covered, place
from edgeattn.arguments import Tensor
from edgeattn.backend_cpu import CpuBackend
from edgeattn.batch import COUNTS
from edgeattn.contract import check_node
from edgeattn.graph import Graph, attributes
from edgeattn.ops import DOMAIN, OPS
from edgeattn.segments import Segment
from edgeattn.views import is_view, view_shapes

STANDARD = {op.onnx: op for op in OPS.values() if op.onnx}
DEFAULTS = {"epsilon": 1e-5}


@dataclass
class Value:
    """A tensor of the graph while it is planned: `offset` elements into the buffer that the value `root` owns."""
    root: str
    shape: tuple          # the first dimension is an int or the name of a count
    stride: int
    offset: int = 0
    dtype: np.dtype = np.dtype(np.float32)


class Plan:
    """`items` holds tables of steps (on the CPU int64 arrays) and Segments, in order; `run` executes them on `state`'s counts."""

    def __init__(self, graph: Graph, before, extra: dict, layer_arguments, inputs: dict[str, np.ndarray], max_counts: dict[str, int],
                 threads: int, progress=None, backend=None):
        """
        before           layer -> [(operator, attributes)] to run before its attention, with the attention's tensors and attributes
        extra            addresses and numbers that ARGS may name ("batch.slots" ...)
        layer_arguments  layer -> more of them, for one layer's cache
        inputs           graph inputs in fixed memory: {name: array}, first dimension a count
        max_counts       the largest value of each count, for sizing buffers
        """
        self.graph, self._before_layer, self.max_counts, self.threads = graph, before, max_counts, threads
        self._extra, self._layer_arguments, self._inputs = extra, layer_arguments, inputs
        self.backend = backend or CpuBackend()
        self.values: dict[str, Value] = {}
        for name, array in inputs.items():
            count = "rows" if name == "logit_rows" else "tokens"
            self.values[name] = Value(name, (count, *array.shape[1:]), int(np.prod(array.shape[1:], dtype=np.int64)), 0, array.dtype)
        groups = self._group()
        kernels = self._load_kernels(groups, progress)
        self._allocate(groups)
        nodes = (node for g in groups if not isinstance(g, Segment) for node in g if node.op_type == "cached_attention")
        groups = [g if isinstance(g, Segment) else self._steps(g, kernels) for g in groups]
        self.steps = [step for g in groups if not isinstance(g, Segment) for step in g]
        attends = [(i, next(nodes)) for i, step in enumerate(self.steps) if step.operator == "cached_attention"]
        self.attentions = {i: (attributes(node)["layer"], node) for i, node in attends}
        scratch = max((step.workspace_bytes for step in self.steps), default=0)  # for all: only one step runs at a time
        self.workspace = self.backend.allocate(scratch)
        self.items = [self._connect(g) if isinstance(g, Segment) else self.backend.table(g, self.workspace) for g in groups if g]
        self.backend.ready([item for item in self.items if not isinstance(item, Segment)], progress)

    # ---- reading the graph --------------------------------------------------------------------------------------
    def _group(self):
        """Nodes in order: lists of native nodes, and Segments of the others. Describes every value on the way."""
        nodes, results = list(self.graph.proto.graph.node), {o.name for o in self.graph.proto.graph.output}
        groups, unknown = [], []
        if clash := set(self._inputs) & set(self.graph.initializers).union(*(node.output for node in nodes)):
            raise ValueError(f"{self.graph.folder}: model.onnx makes {sorted(clash)[0]!r}, which a call gives; export the model again")

        def close(upto):
            if unknown:
                if not self.backend.runs_segments:
                    raise ValueError(f"{self.graph.folder}: the GPU has no kernel for {unknown[0].op_type}: use --device cpu")
                known = {name: (v.dtype, v.shape) for name, v in self.values.items()}
                segment = Segment(self.graph, list(unknown), known, results.union(*(node.input for node in nodes[upto:])))
                for name, dtype, shape in segment.outputs:
                    self.values[name] = Value(name, shape, int(np.prod(shape[1:], dtype=np.int64)), 0, np.dtype(dtype))
                groups.append(segment)
                unknown.clear()
        for i, node in enumerate(nodes):
            if node.domain == DOMAIN or not node.domain and node.op_type in STANDARD:
                close(i)  # whether we know such a node depends on its inputs' shapes
            if self._is_view(node) or self._operator(node) is not None:
                if not groups or isinstance(groups[-1], Segment):
                    groups.append([])
                groups[-1].append(node)
                self._describe_node(node)
            else:
                unknown.append(node)
        close(len(nodes))
        return groups

    def _operator(self, node):
        """The operator that runs this node natively, or None."""
        if node.domain == DOMAIN:
            return OPS.get(node.op_type)
        op = STANDARD.get(node.op_type) if not node.domain else None
        sources = [self.values.get(name) for name in node.input[:2]]
        if op is None or len(sources) < 2 or sources[0] is None or sources[0].dtype != np.float32:
            return None
        if op.name == "rms_normalization":
            return op if attributes(node).get("axis", -1) == -1 else None
        if len(sources[0].shape) != 2:
            return None
        if node.op_type == "Gather":
            axis = attributes(node).get("axis", 0)
            name, at = ("gather_rows", sources[1]) if axis == 0 else ("gather_columns", self.graph.initializers.get(node.input[1]))
            return OPS[name] if axis in (0, 1, -1) and at is not None and len(at.shape) == 1 and at.dtype == np.int64 else None
        return op if sources[1] is not None and sources[1].shape == sources[0].shape and sources[1].dtype == np.float32 else None

    def _is_view(self, node):
        source = self.values.get(node.input[0]) if node.input else None
        return source is not None and is_view(node, source.shape, self.graph.initializers)

    def _load_kernels(self, groups, progress):
        """Import the kernel files the graph needs; the first time on a machine this compiles them."""
        nodes = [node for group in groups if not isinstance(group, Segment) for node in group if not self._is_view(node)]
        names = sorted({self._operator(node).name for node in nodes}.union(*({name for name, _ in self._before(node)} for node in nodes)))
        kernels = {}
        for i, name in enumerate(names):
            if progress:
                progress(name, i, len(names))
            kernels[name] = self.backend.load(name)
        if progress:
            progress("", len(names), len(names))
        return kernels

    def _describe_node(self, node):
        if self._is_view(node):
            return self._view(node)
        op = self._operator(node)
        check_node(self.graph, node, op.name, self.values, COUNTS)
        shapes = {name.rstrip("?"): self._shape(source) for name, source in zip(op.inputs, node.input) if source}
        made = op.shapes(shapes, attributes(node))
        for name, result in zip(op.outputs, node.output):
            if name in made:
                shape = made[name]
                self.values[result] = Value(result, shape, int(np.prod(shape[1:], dtype=np.int64)))

    def _shape(self, name):
        if name in self.graph.initializers:
            return self.graph.initializers[name].shape
        return self.values[name].shape if name in self.values else ()

    def _view(self, node):
        source, offset = self.values[node.input[0]], 0
        for name, shape in zip(node.output, view_shapes(node, source.shape, self.graph.initializers)):
            self.values[name] = Value(source.root, shape, source.stride, source.offset + offset, source.dtype)
            offset += math.prod(shape[1:])

    # ---- memory -------------------------------------------------------------------------------------------------
    def _allocate(self, groups):
        """Give every root value a place in one arena; places are reused once their last reader has run."""
        order = [(g.inputs, [output[0] for output in g.outputs]) if isinstance(g, Segment) else (node.input, node.output)
                 for g in groups for node in ([g] if isinstance(g, Segment) else g)]
        last = {}
        for i, (reads, makes) in enumerate(order):
            for name in (*reads, *makes):
                if name in self.values:
                    last[self.values[name].root] = i
        for output in self.graph.proto.graph.output:
            if output.name in self.values:
                last[self.values[output.name].root] = len(order)
        made = {}  # when
        for i, (_, makes) in enumerate(order):
            for name in makes:
                if name in self.values and self.values[name].root not in self._inputs:
                    made.setdefault(self.values[name].root, i)
        outlives = self.backend.outlives
        offsets, size = place([(root, self._bytes(root), i, last[root] + outlives) for root, i in made.items()])
        self.arena = self.backend.allocate(size)
        start = self.backend.address(self.arena)
        self._address = {root: start + offset for root, offset in offsets.items()}
        self._address |= {name: self.backend.address(array) for name, array in self._inputs.items()}

    def touched_bytes(self, counts: dict[str, int]) -> int:
        """Memory between operators and of their scratch that a call with these counts touches."""
        spans = [(at, at + self._bytes(root, counts)) for root, at in self._address.items() if root not in self._inputs]
        return covered(spans) + self.workspace.nbytes

    def _bytes(self, root, counts=None):
        value = self.values[root]
        rows = (counts or self.max_counts).get(value.shape[0], value.shape[0])
        return -(-rows * int(np.prod(value.shape[1:], dtype=np.int64)) * value.dtype.itemsize // 64) * 64

    def tensor(self, name: str) -> Tensor:
        """Address, shape and stride of a value or initializer."""
        if name in self.graph.initializers:
            return self.backend.weight(self.graph.initializers[name])
        value = self.values[name]
        return Tensor(self._address[value.root] + value.offset * value.dtype.itemsize, value.shape, value.stride, str(value.dtype))

    def view(self, name: str, state: np.ndarray) -> np.ndarray:
        """The value as a NumPy array, at the present counts; of the CPU's own memory only."""
        value = self.values[name]
        rows = int(state[COUNTS.index(value.shape[0])]) if isinstance(value.shape[0], str) else value.shape[0]
        base = self._inputs.get(value.root, self.arena)
        start = self._address[value.root] - base.ctypes.data + value.offset * value.dtype.itemsize
        strides = [value.dtype.itemsize * int(np.prod(value.shape[i + 1:], dtype=np.int64)) for i in range(1, len(value.shape))]
        return np.ndarray((rows, *value.shape[1:]), value.dtype, base, start, (value.stride * value.dtype.itemsize, *strides))

    def read(self, name: str, state: np.ndarray) -> np.ndarray:
        """A copy of the value at the present counts, from wherever it lies."""
        if self.backend.device == "cpu":
            return self.view(name, state).copy()
        return self.backend.fetch(self.tensor(name), int(state[COUNTS.index(self.values[name].shape[0])]))

    # ---- steps --------------------------------------------------------------------------------------------------
    def _before(self, node):
        """(operator, attributes) that are to run before this node."""
        return self._before_layer(attributes(node)["layer"]) if node.op_type == "cached_attention" else []

    def _steps(self, nodes, kernels):
        found = []
        for node in nodes:
            if not self._is_view(node):
                about = self._named(node)
                found += [self._step(f"{node.name}.{name}", name, about[0], about[1] | options, kernels)
                          for name, options in self._before(node)]
                found.append(self._step(node.name, self._operator(node).name, *about, kernels))
        return found

    def _named(self, node):
        """A node's tensors by the operator's names for them, and its attributes."""
        op = self._operator(node)
        pairs = [*zip(op.inputs, node.input), *zip(op.outputs, node.output)]
        tensors = {name.rstrip("?"): self.tensor(source) for name, source in pairs
                   if source in self.values or source in self.graph.initializers}
        given = {name: value for name, value in attributes(node).items() if name in op.attributes}  # others could be taken for addresses
        return tensors, DEFAULTS | given

    def _step(self, name, operator, tensors, attrs, kernels):
        extra = self._extra | (self._layer_arguments(attrs["layer"]) if "layer" in attrs else {})
        extra |= {"selection.group": attrs["group"]} if "group" in attrs else {}
        return self.backend.step(name, operator, kernels[operator], tensors, attrs, extra, self.max_counts, self.threads)

    def _connect(self, segment):
        names = [*segment.inputs, *(name for name, _, _ in segment.outputs)]
        segment.connect({name: partial(self.view, name) for name in names})
        return segment

    def run(self, state: np.ndarray, before_attention=None) -> None:
        """before_attention(layer) is called before each layer's attention, once what it reads is computed."""
        done = 0  # steps
        for item in self.items:
            if isinstance(item, Segment):
                item.run(state)
                continue
            first = 0
            for i in range(len(item)) if before_attention else ():
                if done + i in self.attentions:
                    self.backend.run(item[first:i], state)
                    before_attention(self.attentions[done + i][0])
                    first = i
            self.backend.run(item[first:] if first else item, state)
            done += len(item)

    def attention_inputs(self, layer: int, state: np.ndarray) -> tuple[dict[str, np.ndarray], dict]:
        """(q, k, v, cos, sin of a layer's attention by these names, its attributes)"""
        node = next(node for at, node in self.attentions.values() if at == layer)
        names = {name: source for name, source in zip(OPS["cached_attention"].inputs, node.input) if name in ("q", "k", "v", "cos", "sin")}
        weights = self.graph.initializers
        return {name: weights[x] if x in weights else self.view(x, state) for name, x in names.items()}, DEFAULTS | attributes(node)

    def profile(self, state: np.ndarray) -> list[tuple[str, str, float]]:
        """Run once, step by step; -> (node, operator, seconds) of each. A segment counts as operator "onnxruntime"."""
        found, left = [], iter(self.steps)
        for item in self.items:
            alone = isinstance(item, Segment)
            for i in range(1 if alone else len(item)):
                name, operator = ("segment", "onnxruntime") if alone else ((step := next(left)).name, step.operator)
                self.backend.wait()
                start = perf_counter()
                item.run(state) if alone else self.backend.run(item[i:i + 1], state)
                self.backend.wait()
                found.append((name, operator, perf_counter() - start))
        return found
