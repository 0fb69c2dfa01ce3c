"""How weights are stored: the formats of a precision, and the nodes that read each format."""
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from edgeattn.exporters.checkpoint import Quantised, Weight, concatenate
from edgeattn.exporters.graph import Graph, Spec, tensor_info
from edgeattn.exporters.quantise import quantise_blocks
from edgeattn.ops import PANEL
from edgeattn.reference.matmul_nbits import pack_panels
from edgeattn.reference.matmul_ternary import TILE, pack_ternary

# How ternary weights lie: 2 bits in panels; the same, but where most inputs are zero input by input, so that those are not read; besides,
# five weights to a byte for the others. Only the CPU kernels know the last two.
TERNARY_LAYOUTS = ("panels", "sparse", "dense")
PRECISIONS = ("int4", "int8", "fp16", "fp32", "ternary")
GROUP_SIZES = (16, 32, 64, 128, 256)
LARGEST_SCALE = 65504.0  # of float16
SLAB_BYTES = 4 << 20  # of float32 weights in work at a time


@dataclass(frozen=True)
class Table:
    """A weight [N, K] in a graph."""
    shape: tuple[int, int]
    inputs: list[str]     # the initializers, in the order in which the operators take them
    attributes: dict      # of the operators; empty for plain weights
    order: np.ndarray | None = None  # [K] which inputs the weight's columns are for; None for all in order

    def embed(self, graph: Graph, node: str, ids: str) -> str:
        """Rows of the weight."""
        op = "embedding_nbits" if self.attributes else "embedding"
        return graph.add(op, node, [ids, *self.inputs], self.attributes)

    def project(self, graph: Graph, node: str, x: str, bias: str | None = None, outputs: int | list[str] = 1) -> str:
        """x times the weight, transposed."""
        if self.order is not None:  # of a checkpoint with act-order
            order = graph.value(f"{node}.order", self.order)
            x = graph.add("Gather", f"{node}.reorder", [x, order], {"axis": 1}, domain="")
        if "activation_bits" in self.attributes:
            out = graph.add("matmul_ternary", node, [x, *self.inputs, bias], self.attributes, outputs)
        elif self.attributes:
            zeros = self.inputs[2] if len(self.inputs) > 2 else None
            out = graph.add("matmul_nbits", node, [x, *self.inputs[:2], zeros, bias], self.attributes, outputs)
        else:
            out = graph.add("linear", node, [x, *self.inputs, bias], outputs=outputs)
        if outputs == 1:  # onnx cannot infer a type through MatMulNBits
            graph.values.append(tensor_info(out, TensorProto.FLOAT, ["tokens", self.shape[0]]))
        return out


@dataclass
class Formats:
    """Chooses the format of every weight and remembers it. The embedding and the head (`edge`) of int4 get 8 bits: they cost
    little in a large model and nearly all of the quality in a small one. Ternary weights stay ternary at any precision; it is then
    the embedding's and the head's: 8 bits for "ternary"."""
    precision: str
    group_size: int
    ternary_layout: str = "panels"  # see TERNARY_LAYOUTS
    used: dict[str, str] = field(default_factory=dict)  # {initializer: "int4/32" ...}
    requantised: dict[str, str] = field(default_factory=dict)  # {initializer: how the checkpoint stored its codes}

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; choose one of {list(PRECISIONS)}")
        if self.ternary_layout not in TERNARY_LAYOUTS:
            raise ValueError(f"unknown layout of ternary weights {self.ternary_layout!r}; choose one of {list(TERNARY_LAYOUTS)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size must be one of {list(GROUP_SIZES)}, got {self.group_size}")

    def store(self, graph: Graph, name: str, parts: list[Weight], edge: bool = False, many_zeros: bool = False) -> Table:
        """Plan the concatenation of `parts` as initializer `name`; `many_zeros`: most of what it is multiplied by is zero."""
        weight = concatenate(parts)
        if weight.ternary:
            self.used[name] = "ternary"
            sparse = many_zeros and self.ternary_layout != "panels"
            bits = 1 if self.ternary_layout == "dense" and not sparse else 2
            return _ternary(graph, name, weight, dict(bits=bits, input_major=int(sparse)))
        if self.precision == "ternary" and not edge:
            raise ValueError(f"{name}: not a ternary weight, and only training makes one; choose one of {list(PRECISIONS[:-1])}")
        if weight.quantised and not self.precision.startswith("fp"):
            self.used[name] = f"int{weight.quantised.bits}/{weight.quantised.block_size}"
            return _imported(graph, name, weight.shape, weight.quantised)
        if weight.stored_as:
            self.requantised[name] = weight.stored_as
        if self.precision.startswith("fp"):
            self.used[name] = self.precision
            return _plain(graph, name, weight, {"fp16": "float16", "fp32": "float32"}[self.precision])
        bits = 8 if edge or self.precision == "int8" else 4
        self.used[name] = f"int{bits}/{self.group_size}"
        return _quantised(graph, name, weight, bits, self.group_size)


def _slabs(weight):
    """Consecutive (start, stop) of whole panels of rows."""
    step = max(SLAB_BYTES // (4 * weight.shape[1]) // PANEL, 1) * PANEL
    return ((start, min(start + step, weight.shape[0])) for start in range(0, weight.shape[0], step))


def _plain(graph, name, weight, dtype):
    def slabs():
        for start, stop in _slabs(weight):
            yield (weight.read(start, stop).astype(dtype, copy=False),)
    graph.stream([Spec(name, dtype, weight.shape)], slabs)
    return Table(weight.shape, [name], {})


def _imported(graph, name, shape, quantised: Quantised):
    """Codes that a checkpoint has already, as they are."""
    (n, k), bits, block_size = shape, quantised.bits, quantised.block_size
    panels, blocks, zeros = -(-n // PANEL), -(-k // block_size), quantised.read(0, 1)[2]
    specs = [Spec(name, "uint8", (panels, blocks, block_size * bits // 32, PANEL, 4)), Spec(f"{name}.scales", "float16", (panels, blocks, PANEL))]
    if zeros is not None:
        kind = "uint8" if zeros.dtype == np.uint8 else "float16"
        specs.append(Spec(f"{name}.zero_points", kind, (panels, blocks, PANEL)))

    def slabs():
        for start, stop in _slabs(Weight(shape, quantised.rows)):
            codes, scales, zeros = quantised.read(start, stop)
            if not np.abs(scales).max(initial=0) < LARGEST_SCALE:
                raise ValueError(f"{name}: a scale of the checkpoint is not finite or above {LARGEST_SCALE:g}; it is damaged")
            packed = pack_panels(codes, scales, zeros, bits=bits, block_size=block_size)
            yield packed[:len(specs)]
    graph.stream(specs, slabs)
    return Table(shape, [spec.name for spec in specs], dict(bits=bits, block_size=block_size, K=k, N=n), quantised.order)


def _ternary(graph, name, weight, form):
    (n, k), together = weight.shape, TILE if form["input_major"] else PANEL

    def slabs():
        step = max(SLAB_BYTES // (4 * k) // together, 1) * together
        for start in range(0, n, step):
            yield (pack_ternary(weight.ternary.read(start, min(start + step, n)), **form),)
    first = pack_ternary(np.zeros((together, k), np.int8), **form)
    graph.stream([Spec(name, "uint8", (-(-n // together), *first.shape[1:]))], slabs)
    scales = graph.value(f"{name}.scales", weight.ternary.scales)
    return Table(weight.shape, [name, scales], dict(**form, activation_bits=weight.ternary.activation_bits, K=k, N=n))


def _quantised(graph, name, weight, bits, block_size):
    (n, k), scale_name = weight.shape, f"{name}.scales"
    panels, blocks = -(-n // PANEL), -(-k // block_size)

    def slabs():
        for start, stop in _slabs(weight):
            codes, scales = quantise_blocks(weight.read(start, stop), bits, block_size)
            yield pack_panels(codes, scales, bits=bits, block_size=block_size)[:2]
    graph.stream([Spec(name, "uint8", (panels, blocks, block_size * bits // 32, PANEL, 4)),
                  Spec(scale_name, "float16", (panels, blocks, PANEL))], slabs)
    return Table(weight.shape, [name, scale_name], dict(bits=bits, block_size=block_size, K=k, N=n))
