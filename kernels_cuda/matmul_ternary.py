"""x, rounded to integers per token, times ternary weights of two bits: see the reference for layouts.

Few tokens: gemv_ternary.cu, which reads every weight once for up to FEW of them; many: gemm_ternary.cu, on the int8 matrix units. More
tokens than one are quantised by quantise_tokens.cu before.
"""
import numpy as np

from edgeattn.kernels_cuda import compile, device
from edgeattn.kernels_cuda.steps import Launch, call, ints, pointers

ARGS = ("x", "x.rows", "x.stride", "codes", "codes.1", "scales", "bias", "out", "out.stride", "bits", "activation_bits", "K", "N",
        "workspace", "state", "input_major")
FEW = 8                  # tokens of one pass over the weights
MANY = 17                # tokens from which the matrix units, whose tiles are COLUMNS tokens, are to be faster than passes of FEW
ROWS, COLUMNS = 64, 128  # the tile of gemm_ternary.cu
WARPS = 32               # of gemv_ternary.cu that a processor holds at once
SHARE = 32               # steps that a warp of gemv_ternary.cu has at least: what it asks for at a time
MOST_WARPS = 8


def matmul_ternary(x, codes, scales, bias=None, *, bits, activation_bits, K, N, input_major=0):
    from edgeattn.kernels_cuda import matmul_ternary as kernel
    out = np.empty((len(x), N), np.float32)
    call(kernel, dict(x=x, codes=codes, scales=scales, bias=bias, out=out),
         dict(bits=bits, activation_bits=activation_bits, K=K, N=N, input_major=input_major))
    return out


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """The tokens' codes, whole tiles of them, then what goes with each token."""
    _check(attributes)
    return -(-rows // COLUMNS) * COLUMNS * (tensors["codes"].shape[1] * 16 + 8)


def refusal(about: dict) -> str:
    """Why weights with these attributes cannot be multiplied there."""
    panels = about.get("bits", 2) == 2 and not about.get("input_major")
    return "" if panels else "this layout of ternary weights is for the CPU: export with --ternary-layout panels for --device cuda"


def _check(about):
    if why := refusal(about):
        raise ValueError(why)


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    _check(a)
    tokens, steps = most[a["x.rows"]], a["codes.1"]
    x_codes, info = np.int64(a["workspace"]), np.int64(a["workspace"] + -(-tokens // COLUMNS) * COLUMNS * steps * 16)
    quantise = Launch(compile.function("quantise_tokens", "quantise_tokens"), (tokens, 1, 1), 256,
                      (*pointers(a, "x", "x.stride"), x_codes, info, *pointers(a, "state"), *ints(a, "x.rows", "K"), np.int32(steps),
                       *ints(a, "activation_bits")), overlap=True)
    args = (*pointers(a, "codes"), np.int32(steps), x_codes, info, *pointers(a, "scales", "bias", "out", "out.stride", "state"),
            *ints(a, "x.rows", "N"))  # of both kernels
    if tokens >= MANY:
        grid = -(-a["N"] // ROWS), -(-tokens // COLUMNS), 1
        return [quantise, Launch(compile.function("gemm_ternary", "gemm_ternary"), grid, 256, args, overlap=True)]
    group, warps = 1 if tokens == 1 else 4 if tokens <= 4 else FEW, MOST_WARPS if tokens == 1 else 1  # one token: all of them quantise it
    while warps < MOST_WARPS and warps * 2 * SHARE <= steps:
        warps *= 2
    name, groups, shared = f"gemv_ternary_{group}", -(-tokens // group), steps * 16 if tokens == 1 else 0
    grid = min(-(-a["N"] // 16), max(1, device.about()["processors"] * WARPS // warps // groups)), groups, 1
    gemv = Launch(compile.function("gemv_ternary", name, shared), grid, 32 * warps,
                  (*pointers(a, "x"), *ints(a, "K", "activation_bits"), *args), shared, overlap=True)
    return [gemv] if tokens == 1 else [quantise, gemv]
