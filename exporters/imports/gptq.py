"""GPTQ checkpoints (arXiv 2210.17323) as AutoGPTQ and GPTQModel write them: quant_method "gptq".

For a linear layer [N, K] in groups of K, with codes of 2, 3, 4 or 8 bits:
    qweight  [K * bits / 32, N]       int32   codes of consecutive k, low bits first
    scales   [groups, N]              float16, bfloat16 or float32
    qzeros   [groups, N * bits / 32]  int32   zero points of consecutive outputs; format 1 stores them less one
    g_idx    [K]                      int32   the group of every k
Whatever has no qweight is stored as floats. With `dynamic`, a weight's bits and group size are told by the shapes, so that its
patterns are not needed. With act-order (`desc_act`) g_idx is not ascending: columns are then sorted by group, and the graph
gathers the activation in that order.
"""
import numpy as np

from edgeattn.exporters.imports import whole
from edgeattn.exporters.imports.packing import grouped, unpack_words
from edgeattn.exporters.stored import FLOATS, as_float

BITS = (2, 3, 4, 8)
FORMATS = {"gptq": 1, "gptq_v2": 0}  # what zero points are stored less by


def check(about: dict) -> None:
    bits, group = whole(about, "bits"), whole(about, "group_size")
    if bits not in BITS or group != -1 and group < 1:
        raise ValueError(f"bits must be one of {list(BITS)} and group_size positive or -1, got {bits} and {group}")
    if about.get("checkpoint_format", "gptq") not in FORMATS:
        raise ValueError(f"checkpoint_format {about['checkpoint_format']!r} cannot be read; supported: {sorted(FORMATS)}")
    if about.get("pack_dtype") not in (None, "int32"):
        raise ValueError(f"pack_dtype {about['pack_dtype']!r} cannot be read; supported: ['int32']")


def read_weight(checkpoint, name, shape):
    if f"{name}.qweight" not in checkpoint.tensors:
        return None
    (n, k), about, bands = shape, checkpoint.config["quantization_config"], checkpoint.bands
    bits, group = _format(checkpoint, name, shape, about)
    groups = -(-k // group)
    qweight = checkpoint.find(f"{name}.qweight", (k * bits // 32, n), ("I32",))
    scales = checkpoint.find(f"{name}.scales", (groups, n), FLOATS)
    qzeros = checkpoint.find(f"{name}.qzeros", (groups, n * bits // 32), ("I32",))
    order, less = _order(checkpoint, name, k, group), np.uint8(FORMATS[about.get("checkpoint_format", "gptq")])

    def zero_points(start, stop):
        """[stop - start, groups]; they wrap around, as a zero stored less one does."""
        first, last = start // 32 * 32, min(-(-stop // 32) * 32, n)  # 32 codes fill whole words, whatever their bits
        words = bands.read(qzeros, first * bits // 32, last * bits // 32)
        codes = unpack_words(words.T, bits) + less & np.uint8((1 << bits) - 1)
        return codes[start - first:stop - first]
    symmetric = bool((zero_points(0, n) == 1 << (bits - 1)).all())

    def read(start, stop):
        codes = unpack_words(bands.read(qweight, start, stop), bits).T
        return (codes if order is None else codes[:, order], as_float(bands.read(scales, start, stop), scales.dtype).T,
                None if symmetric else zero_points(start, stop))
    return grouped(shape, bits, group, read, "gptq", order)


def _format(checkpoint, name, shape, about):
    """(bits, group size) of one weight."""
    (n, k), bits, group = shape, about["bits"], about["group_size"]
    packed, scales = (checkpoint.tensors[f"{name}.{part}"].shape if f"{name}.{part}" in checkpoint.tensors else ()
                      for part in ("qweight", "scales"))
    if about.get("dynamic") and len(packed) == len(scales) == 2 and scales[0]:
        bits, group = packed[0] * 32 // k, -(-k // scales[0])
        if bits not in BITS:
            raise ValueError(f"{checkpoint.folder}: {name!r} holds {bits} bits a weight; supported: {list(BITS)}")
    if k * bits % 32 or n * bits % 32:
        raise ValueError(f"{checkpoint.folder}: {name!r} [{n}, {k}] does not fill words of 32 bits with codes of {bits}; the checkpoint is "
                         "damaged")
    return bits, k if group == -1 else min(group, k)


def _order(checkpoint, name, k, group):
    """Columns sorted by group, or None when they are."""
    if f"{name}.g_idx" not in checkpoint.tensors:
        return None
    groups, natural = checkpoint.find(f"{name}.g_idx", (k,), ("I32",)).integers(0, k), np.arange(k) // group
    if np.array_equal(groups, natural):
        return None
    order = np.argsort(groups, kind="stable")
    if not np.array_equal(groups[order], natural):
        raise ValueError(f"{checkpoint.folder}: {name}.g_idx does not name groups of {group}; the checkpoint is damaged or its "
                         "group_size wrong")
    return order
