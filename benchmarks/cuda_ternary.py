"""Products with ternary weights on the GPU at hand, of BitNet-2B's shapes: medians with CUDA events, inputs larger than its L2.

    python benchmarks/cuda_ternary.py            (sh benchmarks/gpu.sh python3 benchmarks/cuda_ternary.py where edgeattn is not installed)

Quantising the activations is in. Launches on different weights follow each other in one CUDA graph, as in a decode step. Beside them the
4-bit product of the same shape. Every shape is compared with integers on the same weights first.
"""
import argparse

import numpy as np
from cuda_kernels import copy_bandwidth, matmul, median_us, normal, random_bytes

from edgeattn.kernels_cuda import device, matmul_ternary, steps
from edgeattn.reference.matmul_ternary import matmul_ternary as reference

SHAPES = ((3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912))  # N, K: qkv, o, gate and up, down
TOKENS = 1, 8, 16, 32, 512, 2048


def launches(codes, scales, x, out, state, scratch, about):
    a = dict.fromkeys(matmul_ternary.ARGS, 0) | about | {
        "x": x.data.ptr, "x.rows": 0, "x.stride": x.shape[1], "codes": codes.data.ptr, "codes.1": codes.shape[1], "scales": scales.data.ptr,
        "out": out.data.ptr, "out.stride": out.shape[1], "workspace": scratch.data.ptr, "state": state.data.ptr}
    return matmul_ternary.launches(a, {0: len(x)})


def ternary(n, k, tokens, repeat):
    """(us of one product in a chain, bytes of its weights)."""
    cp, about = device.cupy(), dict(bits=2, activation_bits=8, K=k, N=n)
    shape = n // 16, k // 16, 16, 4
    size = int(np.prod(shape))
    count = max(2, -(-2 * device.about()["l2_bytes"] // size))
    sets = [random_bytes(size).reshape(shape) for _ in range(count)]  # any code does for speed, and w = -2 for the comparison as well
    scales, x, state = cp.ones(n, np.float32), normal(tokens, k), cp.array([tokens], np.int64)
    out = cp.full((tokens, n), np.nan, np.float32)
    scratch = cp.empty(matmul_ternary.workspace_bytes({"codes": sets[0]}, about, tokens, 1), np.uint8)
    each = [launches(codes, scales, x, out, state, scratch, about) for codes in sets]
    steps.run(each[0])
    some = [0, tokens // 2, tokens - 1]
    expected = reference(x[some].get(), sets[0][:4].get(), np.ones(64, np.float32), **about | {"N": 64})
    np.testing.assert_allclose(out[some, :64].get(), expected, rtol=1e-5, atol=1e-4)
    chain = steps.Graph([launch for made in each for launch in made])
    with chain.stream:
        return median_us(lambda i: chain.launch(), repeat, count), size


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-r", "--repeat", type=int, default=20)
    repeat = parser.parse_args().repeat
    copy = copy_bandwidth(repeat)
    print(device.about(), f"copy {copy:.0f} GB/s", flush=True)
    for n, k in SHAPES:
        for tokens in TOKENS:
            us, size = ternary(n, k, tokens, repeat)
            four = matmul(n, k, 4, 32, tokens, repeat)[1]
            read = size / us / 1e3
            rate = f"{read:.0f} GB/s, {read / copy:.0%} of the copy" if tokens < 16 else f"{2e-6 * tokens * n * k / us:.0f} TOP/s"
            print(f"{tokens} x {n} x {k}: {us:.1f} us, {rate}; 4 bits {four:.1f} us", flush=True)


if __name__ == "__main__":
    main()
