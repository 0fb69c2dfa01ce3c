"""Variants of the GEMV: source substitutions and Python constants, in one process."""
import re, sys, time
import numpy as np
import cuda_kernels as ck
from edgeattn.kernels_cuda import compile, device, matmul_nbits as mm, steps

SHAPES = [(4096, 14336, 4), (2048, 8192, 4), (16384, 2048, 4), (2048, 2048, 4), (3072, 2048, 4)]
KEEP = ("gemv_4_32_1", "gemv_8_32_1")
from w_common import prepare
import w_common


def use(subs, consts):
    w_common.use("gemv_nbits", KEEP, subs, consts)


def gemv4(stages, blocks): return ("GEMV(gemv_4_32_1, 4, 32, 1, 4, 2, false)", f"GEMV(gemv_4_32_1, 4, 32, 1, {stages}, {blocks}, false)")
def early(n): return ("#define EARLY 1", f"#define EARLY {n}")
W16 = ("__launch_bounds__(256, BLOCKS)", "__launch_bounds__(512, BLOCKS)")
W4 = ("__launch_bounds__(256, BLOCKS)", "__launch_bounds__(128, BLOCKS)")
NOREL = ("    release_next();\n    wait_previous();\n    to.out", "    wait_previous();\n    to.out")

R = lambda n: {8: 3, 4: n}
B1 = dict(BLOCKS=1)
VARIANTS = {
    "base": ([], {}),
    "base norelease": ([NOREL], {}),
    "B1 s4": ([], B1),
    "B1 s5": ([gemv4(5, 2)], dict(BLOCKS=1, RING=R(5))),
    "B1 s4 early2": ([early(2)], B1),
    "B1 s4 early3": ([early(3)], B1),
    "B1 s4 early0": ([early(0)], B1),
    "B1 s8 (1 block)": ([gemv4(8, 1)], dict(BLOCKS=1, RING=R(8))),
    "B2 s4 early3": ([early(3)], {}),
    "B2 s3": ([gemv4(3, 2)], dict(RING=R(3))),
    "B1 W16 s3": ([gemv4(3, 1), ("GEMV(gemv_8_32_1, 8, 32, 1, 3, 2", "GEMV(gemv_8_32_1, 8, 32, 1, 3, 1"), W16], dict(BLOCKS=1, WARPS=16, RING=R(3))),
    "B2 W4 s4": ([gemv4(4, 4), W4], dict(BLOCKS=2, WARPS=4)),
    "B3 W4 s3": ([gemv4(3, 4), W4], dict(BLOCKS=3, WARPS=4, RING=R(3))),
}


def main():
    cp, repeat = device.cupy(), 15
    begun = time.perf_counter()
    wanted = sys.argv[1:] or list(VARIANTS)
    prepare([("gemv_nbits", KEEP, *VARIANTS[name]) for name in wanted])
    print(f"compiled {time.perf_counter() - begun:.1f}s")
    l2 = device.about()["l2_bytes"]
    begun = time.perf_counter()
    data = {}
    for n, k, bits in SHAPES:
        first = ck.Weights(n, k, bits)
        sets = [first] + [ck.Weights(n, k, bits) for _ in range(max(2, -(-2 * l2 // first.nbytes)) - 1)]
        data[n, k, bits] = sets, ck.normal(1, k), cp.empty((1, n), np.float32)
    state, scratch = cp.array([1], np.int64), cp.empty(1 << 20, np.uint8)
    stream = cp.cuda.Stream(non_blocking=True)
    made = ck.DecodeStep(16)
    for name in wanted:
        try:
            use(*VARIANTS[name])
            line = f"{name:18}"
            with stream:
                for (n, k, bits), (sets, x, out) in data.items():
                    each = [w.launches(x, out, state, scratch, 1) for w in sets]
                    steps.run(each[0]); ck.check(sets[0], x, out)
                    chain = steps.Graph([l for ls in each for l in ls], stream)
                    us = ck.median_us(lambda i: chain.launch(), repeat, len(sets))
                    line += f" {n}x{k} {us:6.2f}"
            most = {0: 1}
            launches = [l for s in ck.fused_steps.fuse(made.steps, most) for l in s.kernel.launches(s.arguments, most)]
            with stream:
                graph = steps.Graph(launches, stream)
                us = ck.median_us(lambda i: graph.launch(), repeat)
                made.state[0] = 0
                stream.synchronize(); device.cupy().cuda.Device().synchronize()
                empty = ck.median_us(lambda i: graph.launch(), repeat)
                made.state[0] = 1
                cp.cuda.Device().synchronize()
            print(line + f" | step {us:6.1f} empty {empty:6.1f}  {time.perf_counter() - begun:.0f}s", flush=True)
        except Exception as e:
            print(name, "failed", repr(e)[:150], flush=True)


if __name__ == "__main__":
    ck.WARM = 0.02
    main()
