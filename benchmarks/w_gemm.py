"""Products of few and many tokens, by variants of the matrix kernel."""
import sys, time
import numpy as np
import cuda_kernels as ck
import w_bench
import w_common
from edgeattn.kernels_cuda import compile, device, matmul_nbits as mm, steps

SHAPES = [(4096, 14336, 4), (2048, 8192, 4), (16384, 2048, 4), (4096, 4096, 4), (4096, 14336, 3), (4096, 14336, 2)]
TOKENS = (4, 8, 16, 32, 64, 96, 128, 256, 512)
KEEP = ("gemm_4_16", "gemm_4_32", "gemm_4_64", "gemm_4_128")
def line(c, units, stages, blocks): return (f"GEMM(gemm_4_{c}, 4, 64, {c}, ", f"GEMM(gemm_4_{c}, 4, 64, {c}, {units}, {stages}, NONE, {blocks}) //")
def tall(n): return ("GEMM(gemm_4_128, 4, 64, 128, 2, 4, NONE, TWO)", f"GEMM_P(gemm_4_128, 4, 128, 128, 2, 1, 4, NONE, {n})")
BIG = dict(MANY=2, TALL={128: 128}, SHARED_TILE=1 << 17)
VARIANTS = {
    "base": ([], dict(MANY=2)),
    "gemv": ([], dict(MANY=9)),
    "16: 4 blocks": ([line(16, 4, 4, 4)], dict(MANY=2, NARROW={16: 4, 32: 2, 64: 2})),
    "tall": ([tall(2)], BIG),
    "tall, 1 block": ([tall(1)], BIG),
}


def main():
    cp, repeat, begun = device.cupy(), 9, time.perf_counter()
    wanted = sys.argv[1:] or list(VARIANTS)
    w_common.prepare([("gemm_nbits", KEEP, *VARIANTS[name]) for name in wanted] + [
        (name,) for name in ("gemm_nbits_any", "gemm_nbits_low", "gemm_nbits_zeros", "gemm_nbits", "quantise", "gemv_nbits", "gemv_nbits_any")] + [
        ("gemv_nbits", w_bench.KEEP, *variant) for variant in w_bench.VARIANTS.values()])
    l2 = device.about()["l2_bytes"]
    print(f"compiled {time.perf_counter() - begun:.1f}s; tokens {TOKENS}")
    data = {}
    for n, k, bits in SHAPES:
        first = ck.Weights(n, k, bits)
        data[n, k, bits] = [first] + [ck.Weights(n, k, bits) for _ in range(max(2, -(-2 * l2 // first.nbytes)) - 1)]
    stream = cp.cuda.Stream(non_blocking=True)
    for name in wanted:
        w_common.use("gemm_nbits", KEEP, *VARIANTS[name])
        text = f"{name:18}"
        for (n, k, bits), sets in data.items():
            if bits < 4 and name != "base": continue
            text += f' {n}x{k}x{bits}:'
            for tokens in (16, 64, 512) if bits < 4 else (4, 8) if name == "gemv" else (128, 512) if name[:4] == "tall" else (16,) if name[:3] == "16:" else TOKENS:
                try:
                    x, out, state = ck.normal(tokens, k), cp.full((tokens, n), np.nan, np.float32), cp.array([tokens], np.int64)
                    scratch = cp.full(mm.workspace_bytes({}, dict(bits=bits, K=k, block_size=32), tokens, 1), 255, np.uint8)
                    with stream:
                        each = [w.launches(x, out, state, scratch, tokens) for w in sets]
                        steps.run(each[0], stream)
                        stream.synchronize()
                        if (name == "base" or name[:4] == "tall") and n < 16384: ck.check(sets[0], x, out)
                        again = out.copy()
                        chain = steps.Graph([l for ls in each for l in ls], stream)
                        us = ck.median_us(lambda i: chain.launch(), repeat, len(sets))
                        steps.run(each[0], stream)
                        same = bool((again == out).all())
                    text += f" {us:.1f}" + ("" if same else "!")
                except (Exception, SystemExit) as e:
                    text += " " + repr(e)[:60]
        print(text + f" {time.perf_counter() - begun:.0f}s", flush=True)


if __name__ == "__main__":
    ck.WARM = 0.01
    main()
