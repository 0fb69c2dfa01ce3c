"""HQQ checkpoints (github.com/mobiusml/hqq) as transformers writes them: quant_method "hqq".

A linear layer [N, K], cut into groups of g neighbours in memory order, is a matrix [N * K / g, g] (axis 1), or [g, N * K / g] with
a group in each column (axis 0). Of that matrix:
    W_q          codes of 8, 4, 3, 2 or 1 bits. Rows are packed by stacking equal parts: with 4 bits the first half of the rows is
                 in the high nibbles, with 3 bits each of ten tenths (the last one padded) has 3 bits of an int32, high bits first
    scale, zero  one for each group: w = (code - zero) * scale; zero is no whole number
    nbits, group_size, axis ...  one number each; config.json has them for all layers alike
Groups of axis 1 are blocks of ours. Groups of axis 0 run over outputs, which ours cannot: those weights become floats.
"""
import math

import numpy as np

from edgeattn.exporters.checkpoint import Weight
from edgeattn.exporters.imports.packing import grouped
from edgeattn.exporters.stored import FLOATS, INTEGERS, ITEM_BYTES, read_bytes

STACKED = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}  # rows that share one byte, or one int32 for 3 bits


def check(about: dict) -> None:
    if not isinstance(about.get("quant_config"), dict):
        raise ValueError("has no quant_config")


def read_weight(checkpoint, name, shape):
    if f"{name}.W_q" not in checkpoint.tensors:
        return None
    bits, group, axis = (_setting(checkpoint, name, key) for key in ("nbits", "group_size", "axis"))
    bits, size = 8 if bits in (5, 6) else bits, math.prod(shape)
    group = (shape[1] if axis == 1 else shape[0]) if group is None else group
    if bits not in STACKED or axis not in (0, 1) or type(group) is not int or group < 1 or size % group:
        raise ValueError(f"{checkpoint.folder}: {name!r} has nbits {bits}, group_size {group} and axis {axis}; readable are nbits "
                         f"{sorted(STACKED)}, groups that divide the weight, and axis 0 or 1")
    codes = _Codes(checkpoint, name, bits, *((size // group, group) if axis == 1 else (group, size // group)))
    scale, zero = (_of_groups(checkpoint, f"{name}.{part}", size // group) for part in ("scale", "zero"))
    n, k = shape
    if axis == 1 and k % group == 0:
        def read(start, stop):
            span = start * k // group, stop * k // group
            return codes.read(start * k, stop * k).reshape(-1, k), *(part.read(*span).reshape(stop - start, -1) for part in (scale, zero))
        return grouped(shape, bits, group, read, "hqq")

    def floats(start, stop):
        at = np.arange(start * k, stop * k)
        at = at // group if axis == 1 else at % (size // group)
        scales, zeros = (part.read(0, size // group)[at] for part in (scale, zero))
        return ((codes.read(start * k, stop * k) - zeros) * scales).reshape(-1, k)
    return Weight(shape, floats, None, f"hqq {bits} bits, groups of {group} along axis {axis}")


class _Codes:
    """The codes of a matrix [rows, width], in memory order."""

    def __init__(self, checkpoint, name, bits, rows, width):
        self.bits, self.stacked = bits, STACKED[bits]
        self.part = -(-rows // self.stacked) * width  # codes of one of the stacked parts
        self.kind = np.dtype(np.uint32 if bits == 3 else np.uint8)
        tensor = self.tensor = checkpoint.tensors[f"{name}.W_q"]
        if rows % self.stacked and bits != 3 or math.prod(tensor.shape) * ITEM_BYTES.get(tensor.dtype, 0) != self.part * self.kind.itemsize:
            raise ValueError(f"{checkpoint.folder}: {name}.W_q {list(tensor.shape)} does not hold {rows} x {width} codes of {bits} bits; "
                             "the checkpoint is damaged or its group_size wrong")

    def read(self, start, stop):
        """Codes start ... stop: uint8."""
        out, size = np.empty(stop - start, np.uint8), self.kind.itemsize
        for i in range(start // self.part, -(-stop // self.part)):
            first, last = max(start, i * self.part), min(stop, (i + 1) * self.part)
            raw = read_bytes(self.tensor.path, self.tensor.offset + (first - i * self.part) * size, (last - first) * size).view(self.kind)
            shift = self.kind.type(self.bits * (self.stacked - 1 - i))
            out[first - start:last - start] = raw >> shift & self.kind.type((1 << self.bits) - 1)
        return out


def _of_groups(checkpoint, name, groups):
    tensor = checkpoint.tensors.get(name)
    if tensor is None or tensor.dtype not in FLOATS or math.prod(tensor.shape) != groups:
        raise ValueError(f"{checkpoint.folder}: {name} is not one float for each of {groups} groups; scales or zero points that are "
                         "quantised themselves cannot be read")
    return tensor


def _setting(checkpoint, name, key):
    """A layer's own setting, or the one in config.json for layers of its kind, or for all."""
    tensor = checkpoint.tensors.get(f"{name}.{key}")
    if tensor is not None and math.prod(tensor.shape) == 1 and tensor.dtype in INTEGERS:
        return int(tensor.integers(0, 1)[0])
    about = checkpoint.config["quantization_config"]["quant_config"]
    about = about.get(name.split(".", 3)[-1], about)
    settings = about.get("weight_quant_params", about) if isinstance(about, dict) else None
    return settings.get(key) if isinstance(settings, dict) else None
