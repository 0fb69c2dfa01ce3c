"""How weights are stored: the formats of a precision, and the nodes that read each format."""
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from edgeattn.exporters.checkpoint import Quantised, Weight, concatenate
from edgeattn.exporters.graph import Graph, Spec, tensor_info
from edgeattn.exporters.quantisers import Statistics, load as load_quantiser
from edgeattn.ops import PANEL
from edgeattn.reference.matmul_nbits import pack_panels
from edgeattn.reference.matmul_ternary import TILE, pack_ternary

PRECISIONS = ("int2", "int3", "int4", "int8", "fp16", "fp32", "ternary")  # or an average, as "int3.25"
WIDTHS = (2, 3, 4, 8)  # bits that operators can read
EDGE_BITS = 8
# How ternary weights lie: 2 bits in panels; the same, but where most inputs are zero input by input, so that those are not read; besides,
# five weights to a byte for the others. Only the CPU kernels know the last two.
TERNARY_LAYOUTS = ("panels", "sparse", "dense")
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
        out = graph.add(op, node, [ids, *self.inputs], self.attributes)
        if self.order is not None:
            back = graph.value(f"{node}.order", np.argsort(self.order))
            out = graph.add("Gather", f"{node}.reorder", [out, back], {"axis": 1}, domain="")
        return out

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


def bits_of(precision: str) -> float | None:
    """Bits of "int4", or the average of "int3.25"; None for floats and for weights that are ternary. ValueError for anything else."""
    if precision == "ternary":
        return None
    if precision in ("fp16", "fp32"):
        return None
    try:
        bits = float(precision.removeprefix("int"))
    except ValueError:
        bits = 0
    if not (precision.startswith("int") and (bits in WIDTHS or WIDTHS[0] < bits < WIDTHS[-1])):
        raise ValueError(f"unknown precision {precision!r}; choose one of {list(PRECISIONS)}, or an average of bits from "
                         f"{WIDTHS[0]} to {WIDTHS[-1]} as int3.25")
    return bits


@dataclass
class Formats:
    """Chooses the format of every weight and remembers it. The embedding and the head (`edge`) get 8 bits at any width: they cost
    little in a large model and nearly all of the quality in a small one, and rounding them needs no statistics. Ternary weights stay
    ternary at any precision; it is then the embedding's and the head's."""
    precision: str
    group_size: int
    quantiser: str = "rtn"
    statistics: Callable[[str], Statistics] | None = None  # of an initializer's input, for quantisers that need them
    widths: dict[str, int] = field(default_factory=dict)  # {initializer: bits}; all have the precision's without
    stored: dict[str, Weight] = field(default_factory=dict)  # {initializer: what `bits` applies to}
    ternary_layout: str = "panels"  # see TERNARY_LAYOUTS
    requantise: bool = False  # round codes of a checkpoint again, instead of keeping them
    used: dict[str, str] = field(default_factory=dict)  # {initializer: "int4/32" ...}
    requantised: dict[str, str] = field(default_factory=dict)  # {initializer: how the checkpoint stored its codes}
    rounded: bool = False  # whether a weight was quantised here to less than 8 bits

    def __post_init__(self):
        self.bits = bits_of(self.precision)
        load_quantiser(self.quantiser)
        if self.ternary_layout not in TERNARY_LAYOUTS:
            raise ValueError(f"unknown layout of ternary weights {self.ternary_layout!r}; choose one of {list(TERNARY_LAYOUTS)}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group size must be one of {list(GROUP_SIZES)}, got {self.group_size}")
        if self.group_size < 32 and self.bits and self.bits < 4 and self.bits != 2:
            raise ValueError(f"3-bit weights need a group size of 32 or more, got {self.group_size}")

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
        if weight.quantised and not self.precision.startswith("fp") and (edge or not self.requantise):
            self.used[name] = f"int{weight.quantised.bits}/{weight.quantised.block_size}"
            return _imported(graph, name, weight.shape, weight.quantised)
        if self.precision.startswith("fp"):
            self.used[name] = self.precision
            return _plain(graph, name, weight, {"fp16": "float16", "fp32": "float32"}[self.precision])
        if not edge:
            self.stored[name] = weight
        if weight.stored_as:
            self.requantised[name] = weight.stored_as
        bits = EDGE_BITS if edge else self.widths.get(name, self.bits)
        self.rounded |= bits < EDGE_BITS
        self.used[name] = f"int{bits:g}/{self.group_size}"
        return self._quantised(graph, name, weight, int(bits), edge)

    def _quantised(self, graph, name, weight, bits, edge):
        method = load_quantiser("rtn" if edge else self.quantiser)
        specs, attributes = _plan(name, weight.shape, bits, self.group_size, method.ZERO_POINTS)

        def slabs():
            statistics = self.statistics(name) if method.NEEDS_STATISTICS else None  # made now, in the order of the file
            for start, stop in [(0, weight.shape[0])] if statistics else _slabs(weight):
                codes, *rest = method.quantise(weight.read(start, stop), bits, self.group_size, statistics)
                yield pack_panels(codes[:, :weight.shape[1]], *rest, bits=bits, block_size=self.group_size)[:len(specs)]
        graph.stream(specs, slabs)
        return Table(weight.shape, [spec.name for spec in specs], attributes)


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
    bits, block_size, zeros = quantised.bits, quantised.block_size, quantised.read(0, 1)[2]
    specs, attributes = _plan(name, shape, bits, block_size, None if zeros is None else "uint8" if zeros.dtype == np.uint8 else "float16")

    def slabs():
        for start, stop in _slabs(Weight(shape, quantised.rows)):
            codes, scales, zeros = quantised.read(start, stop)
            if not np.abs(scales).max(initial=0) < LARGEST_SCALE:
                raise ValueError(f"{name}: a scale of the checkpoint is not finite or above {LARGEST_SCALE:g}; it is damaged")
            packed = pack_panels(codes, scales, zeros, bits=bits, block_size=block_size)
            yield packed[:len(specs)]
    graph.stream(specs, slabs)
    return Table(shape, [spec.name for spec in specs], attributes, quantised.order)


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


def _plan(name, shape, bits, block_size, zero_points):
    """The initializers of a block-quantised weight, and its operators' attributes. zero_points: their type, None without."""
    n, k = shape
    panels, blocks = -(-n // PANEL), -(-k // block_size)
    specs = [Spec(name, "uint8", (panels, blocks, block_size * bits // 32, PANEL, 4)),
             Spec(f"{name}.scales", "float16", (panels, blocks, PANEL))]
    if zero_points:
        specs.append(Spec(f"{name}.zero_points", zero_points, (panels, blocks, PANEL)))
    return specs, dict(bits=bits, block_size=block_size, K=k, N=n)
