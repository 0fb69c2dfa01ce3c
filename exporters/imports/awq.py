"""AWQ checkpoints (arXiv 2306.00978) as AutoAWQ writes them for its "gemm" kernels: quant_method "awq".

For a linear layer [N, K] in groups of K, with codes of 4 bits:
    qweight  [K, N / 8]       int32   nibble i of word c is output 8 * c + ORDER[i]
    qzeros   [groups, N / 8]  int32   zero points, packed alike
    scales   [groups, N]      float16, bfloat16 or float32
Whatever has no qweight (`modules_to_not_convert`) is stored as floats.
"""
import numpy as np

from edgeattn.exporters.imports import whole
from edgeattn.exporters.imports.packing import grouped
from edgeattn.exporters.stored import FLOATS, as_float

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SHIFTS = np.argsort(ORDER).astype(np.uint32) * np.uint32(4)  # of outputs 0 ... 7 of a word


def check(about: dict) -> None:
    bits, group = whole(about, "bits", "w_bit"), whole(about, "group_size", "q_group_size")
    version = str(about.get("version", "gemm")).lower()
    if bits != 4 or group != -1 and group < 1:
        raise ValueError(f"bits must be 4 and group_size positive or -1, got {bits} and {group}")
    if version != "gemm":
        raise ValueError(f"version {version!r} cannot be read; supported: ['gemm']")


def read_weight(checkpoint, name, shape):
    if f"{name}.qweight" not in checkpoint.tensors:
        return None
    (n, k), group, bands = shape, whole(checkpoint.config["quantization_config"], "group_size", "q_group_size"), checkpoint.bands
    group = k if group == -1 else min(group, k)
    if n % 8:
        raise ValueError(f"{checkpoint.folder}: {name!r} has {n} outputs, which do not fill words of 8; the checkpoint is damaged")
    groups = -(-k // group)
    qweight = checkpoint.find(f"{name}.qweight", (k, n // 8), ("I32",))
    qzeros = checkpoint.find(f"{name}.qzeros", (groups, n // 8), ("I32",))
    scales = checkpoint.find(f"{name}.scales", (groups, n), FLOATS)

    def outputs(tensor, start, stop):
        """Codes of outputs start ... stop: uint8 [stop - start, rows]."""
        words = bands.read(tensor, start // 8, -(-stop // 8)).view(np.uint32)
        codes = (words[:, :, None] >> SHIFTS & np.uint32(15)).astype(np.uint8).reshape(len(words), -1)
        return codes[:, start % 8:start % 8 + stop - start].T

    def read(start, stop):
        return outputs(qweight, start, stop), as_float(bands.read(scales, start, stop), scales.dtype).T, outputs(qzeros, start, stop)
    return grouped(shape, 4, group, read, "awq")
