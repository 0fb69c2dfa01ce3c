"""x times a float32 or float16 weight [N, K], transposed, plus bias."""
import numpy as np

from edgeattn.kernels_cuda import compile
from edgeattn.kernels_cuda.steps import Launch, call, ints, pointers

ARGS = ("x", "x.rows", "x.stride", "weight", "weight.type", "weight.0", "weight.1", "weight.stride", "bias", "out", "out.stride", "state")
FEW = 8      # tokens of one pass over the weight
WARPS = 8    # of a block then, each of them one output of one token, or OUTPUTS of more
OUTPUTS = 4
TILE = 64    # tokens and outputs of a block else


def linear(x, weight, bias=None):
    from edgeattn.kernels_cuda import linear as kernel
    out = np.empty((len(x), len(weight)), np.float32)
    call(kernel, dict(x=x, weight=weight, bias=bias, out=out))
    return out


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    tokens, n, kind = most[a["x.rows"]], a["weight.0"], "f16" if a["weight.type"] else "f32"
    size = 2 if a["weight.type"] else 4
    aligned = not (a["x"] | a["weight"] | 4 * a["x.stride"] * (tokens > 1) | size * a["weight.stride"]) % 16
    args = (*pointers(a, "x", "x.stride", "weight", "weight.stride", "bias", "out", "out.stride", "state"),
            *ints(a, "x.rows", "weight.0", "weight.1"), np.int32(aligned))
    if tokens <= FEW:
        function = compile.function("linear", f"gemv_{kind}_{1 if tokens == 1 else FEW}")
        outputs = WARPS if tokens == 1 else WARPS * OUTPUTS
        return [Launch(function, (-(-n // outputs), 1, 1), 32 * WARPS, args, overlap=True)]
    return [Launch(compile.function("linear", f"gemm_{kind}"), (-(-n // TILE), -(-tokens // TILE), 1), 256, args, overlap=True)]
