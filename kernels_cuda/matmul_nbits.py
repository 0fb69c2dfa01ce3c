"""x times block-quantised weights, with x rounded to int8 per token and block: see the reference for layouts.

Few tokens: gemv_nbits.cu, which reads every weight once for up to FEW of them. Many: gemm_nbits.cu, on the int8 matrix units (but blocks of
16, which are no whole product of theirs). What few models have, such as 2 and 3 bits and zero points that are halves, stands in sources of
its own, so that those that all need are compiled soon.
"""
import numpy as np

from edgeattn.arguments import TYPES
from edgeattn.kernels_cuda import compile, device, fused_steps
from edgeattn.kernels_cuda.steps import Launch, call, ints, pointers

ARGS = ("x", "x.rows", "x.stride", "codes", "scales", "zero_points", "bias", "out", "out.stride", "bits", "block_size", "K", "N",
        "workspace", "state", "zero_points.type")
HALVES = TYPES["float16"]
FEW = 8              # tokens of one pass over the weights
MANY = 9             # tokens from which the matrix units are faster than passes of FEW
WARPS = 8            # of a block of gemv_nbits.cu
BLOCKS = 2           # of them that a processor runs at a time
RING = {8: 3}        # STAGES of gemv_nbits.cu's kernels where they are not 4: by bits, of units of 32
# Tiles of gemm_nbits.cu, ROWS outputs each, by their tokens: units of a step of K, and blocks that a processor runs at a time.
ROWS, COLUMNS, TILES = 64, 128, {16: (4, 3), 32: (4, 2), 64: (4, 2), 128: (2, 2)}
STAGES = 4           # steps of K under way
SUMS = 2 * ROWS * COLUMNS * 4  # bytes of partial sums for each processor, at most
SHORTEST, MOST_RANGES = 8, 16  # steps of K that a block has at least; blocks that share a tile
WEIGHTS = np.dtype([("codes", "i8"), ("scales", "i8"), ("zero_points", "i8"), ("units", "i4"), ("block_shift", "i4"), ("panels", "i4"),
                    ("halves", "i4")])  # the kernels' struct Weights


def matmul_nbits(x, codes, scales, zero_points=None, bias=None, *, bits, block_size, K, N):
    from edgeattn.kernels_cuda import matmul_nbits as kernel
    out = np.empty((len(x), N), np.float32)
    tensors = dict(x=x, codes=codes, scales=scales.view(np.uint16), zero_points=zero_points, bias=bias, out=out)
    call(kernel, tensors, dict(bits=bits, block_size=block_size, K=K, N=N))
    return out


def workspace_bytes(tensors, attributes, rows, threads) -> int:
    """Quantised activations of `rows` tokens, whole tiles of them: codes, then the units' scales and sums. Then partial sums."""
    padded, units, pitch = _padded(rows, attributes["K"], attributes["block_size"])
    return padded * (pitch + units * 8) + (device.about()["processors"] * SUMS if rows >= MANY else 0)


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    tokens, (unit, units, shift) = most[a["x.rows"]], _units(a["K"], a["block_size"])
    weights = np.zeros((), WEIGHTS)
    weights["codes"], weights["scales"], weights["zero_points"] = a["codes"], a["scales"], a["zero_points"]
    weights["units"], weights["block_shift"], weights["panels"] = units, shift, -(-a["N"] // 16)
    weights["halves"] = bool(a["zero_points"]) and a["zero_points.type"] == HALVES
    if tokens == 1 and unit == 32:
        return [_gemv(a, 1, weights, unit, 1)]
    quantise = _quantise(a, tokens, unit, units, shift)
    if tokens < MANY or unit == 16:
        four = tokens <= 4 and (a["bits"], unit) == (4, 32) and not weights["halves"]
        return [quantise, _gemv(a, tokens, weights, unit, 4 if four else FEW)]
    return [quantise, _gemm(a, tokens, weights)]


def _takes_any(a, weights) -> bool:
    """Whether a product's kernels are those of the sources `any`."""
    return a["bits"] < 4 or bool(weights["halves"])


def _units(k, block_size) -> tuple[int, int, int]:
    """K of a unit, units of a row, log2 of the units in a block."""
    unit = min(block_size, 32)
    return unit, -(-k // block_size) * block_size // unit, (block_size // unit).bit_length() - 1


def _padded(tokens, k, block_size) -> tuple[int, int, int]:
    """Tokens, units and bytes of a row of codes in the workspace, filled up to whole tiles and steps of gemm_nbits.cu."""
    unit, units, _ = _units(k, block_size)
    units = -(-units // 4) * 4
    return -(-tokens // COLUMNS) * COLUMNS, units, units * unit


def _places(a, tokens) -> tuple:
    """Arguments for codes, bytes from one token's to the next's, info, tokens from one unit's to the next's."""
    rows, _, pitch = _padded(tokens, a["K"], a["block_size"])
    return np.int64(a["workspace"]), np.int64(pitch), np.int64(a["workspace"] + rows * pitch), np.int32(rows)


def _quantise(a, tokens, unit, units, shift) -> Launch:
    codes, pitch, info, rows = _places(a, tokens)
    padded, parts = _padded(tokens, a["K"], a["block_size"])[1], unit // 8
    grid = tokens, max(1, min(-(-padded * parts // 128), 4096 // tokens)), 1
    args = (*pointers(a, "x", "x.stride"), codes, pitch // 4, info, rows, *pointers(a, "state"), *ints(a, "x.rows", "K"), np.int32(units),
            np.int32(padded), np.int32(shift))
    return Launch(compile.function("quantise", f"quantise_{a['bits']}_{unit}"), grid, 128, args, overlap=True)


def team_of(panels: int, units: int, processors: int) -> int:
    """Warps that share a panel: as many as keep the processors busy, and at least one round of 8 units each."""
    team = 1
    while team < WARPS and panels * team * 2 <= processors * BLOCKS * WARPS and team * 2 * 8 <= units:
        team *= 2
    return team


def _gemv(a, tokens, weights, unit, group) -> Launch:
    """`group` tokens at a time: one of those that gemv_nbits.cu has a kernel for."""
    about, panels, units = device.about(), int(weights["panels"]), int(weights["units"])
    takes_any = _takes_any(a, weights)
    stage = (RING.get(a["bits"], 4) if unit == 32 else 4) * (unit * a["bits"] // 32 * 512 + 32 * (16 if takes_any else 12))
    activations, warps = units * (unit + 8) if group == 1 else 0, WARPS
    while warps > 1 and warps * (stage + 2 * group * 64) + activations > about["shared_bytes"]:
        warps //= 2
    nearby = fused_steps.around(a)
    shares = int(nearby["half"]) or panels  # that teams share: panels, or pairs of them
    shared, team = warps * (stage + 2 * group * 64) + activations, min(warps, team_of(shares, units, about["processors"]))
    grid = min(-(-shares * team // warps), about["processors"] * BLOCKS), -(-tokens // group), 1
    x_codes, pitch, info, rows = (np.int64(0), np.int64(0), np.int64(0), np.int32(1)) if group == 1 else _places(a, tokens)
    args = (np.int64(fused_steps.row_of(a)), x_codes, info, pitch // 4, rows, weights, *pointers(a, "bias", "out", "out.stride", "state"),
            *ints(a, "x.rows", "K", "N"), np.int32(team.bit_length() - 1), nearby)
    kernel = f"gemv_{a['bits']}_{unit}_{group}"
    found = compile.function("gemv_nbits_any", kernel, shared) if takes_any else compile.function("gemv_nbits", kernel, shared)
    return Launch(found, grid, 32 * warps, args, shared, overlap=True)


def _gemm_kernel(bits, zeros, columns, shared):
    """zeros: "", "_zeros" (bytes) or "_halves"."""
    kernel = f"gemm_{bits}{zeros}_{columns}"
    if zeros == "_halves":
        return compile.function("gemm_nbits_any", kernel, shared)
    if bits < 4:
        return compile.function("gemm_nbits_low", kernel, shared)
    return compile.function("gemm_nbits_zeros", kernel, shared) if zeros else compile.function("gemm_nbits", kernel, shared)


def _gemm(a, tokens, weights) -> Launch:
    zeros = "" if not a["zero_points"] else "_halves" if weights["halves"] else "_zeros"
    columns = next((c for c in TILES if tokens <= c), COLUMNS)
    step, blocks = TILES[columns]
    shared = STAGES * step * (ROWS * 4 * a["bits"] + columns * 40 + ROWS * (4 if weights["halves"] else 3))
    tiles, token_tiles, steps = -(-a["N"] // ROWS), -(-tokens // columns), -(-int(weights["units"]) // step)
    ranges = max(1, min(device.about()["processors"] * blocks // (tiles * token_tiles), steps // SHORTEST, MOST_RANGES))
    x_codes, pitch, info, rows = _places(a, tokens)
    partials = info + np.int64(rows) * (pitch // 32) * 8
    args = (x_codes, pitch, info, rows, weights, *pointers(a, "bias", "out", "out.stride"), partials, *pointers(a, "state"),
            *ints(a, "x.rows", "N"))
    found = _gemm_kernel(a["bits"], zeros, columns, shared)
    return Launch(found, (tiles, token_tiles, ranges), 256, args, shared, overlap=True)
