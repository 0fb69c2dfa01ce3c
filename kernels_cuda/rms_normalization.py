"""Root-mean-square normalisation of every row, or of every group of a row (a head, for QK norm); of one row what puts its columns in
another order may be part of it (fused_steps.py)."""
import numpy as np

from edgeattn.kernels_cuda import compile, fused_steps
from edgeattn.kernels_cuda.steps import Launch, as_f32, call, ints, pointers

ARGS = ("x", "x.rows", "x.stride", "x.groups", "x.width", "weight", "out", "out.stride", "epsilon", "state")
WARPS = 8      # groups of a block, where a warp has a group
NARROW = 256   # widths up to which it has


def rms_normalization(x, weight, *, epsilon):
    from edgeattn.kernels_cuda import rms_normalization as kernel
    out = np.empty(x.shape, np.float32)
    call(kernel, dict(x=x, weight=weight, out=out), dict(epsilon=epsilon))
    return out


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    rows, groups, width = most[a["x.rows"]], a["x.groups"], a["x.width"]
    args = (*pointers(a, "x", "x.stride", "weight", "out", "out.stride", "state"), *ints(a, "x.rows", "x.groups", "x.width"),
            as_f32(a["epsilon"]), *pointers(a.get(fused_steps.AFTER, {"order": 0, "out": 0}), "order", "out"))
    if width <= NARROW:
        return [Launch(compile.function("rms_normalization", "rms_groups"), (rows, -(-groups // WARPS), 1), 32 * WARPS, args, overlap=True)]
    threads = min(1024, -(-width // 128) * 32)  # four elements each, up to 4,096
    return [Launch(compile.function("rms_normalization", "rms_rows"), (rows, groups, 1), threads, args, overlap=True)]
