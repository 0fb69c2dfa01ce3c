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
def always(a, near): return True
def normal(a, near): return bool(near["gain"])
def others(a, near): return not near["gain"]
def long_rows(a, near): return a["K"] > 4096
def normal_long(a, near): return bool(near["gain"]) or a["K"] > 4096 and a["N"] < 4096
def r80(s): return ("__launch_bounds__(TOKENS == 1 ? 512 : 256, TOKENS == 1 ? BLOCKS / 2 : BLOCKS)", "__launch_bounds__(256, BITS == 4 ? 3 : BLOCKS)")
def l2(n): return ("cp.async.cg.shared.global [%0], [%1], 16, %2;", f"cp.async.cg.shared.global.L2::{n}B [%0], [%1], 16, %2;")
R80 = [r80(3), ("quantise_row<BITS, UNIT, true, 7>", "quantise_row<BITS, UNIT, true, 2>"),
       ("quantise_row<BITS, UNIT, true, 4>", "quantise_row<BITS, UNIT, true, 2>"),
       ("quantise_normal<BITS, UNIT, 4>", "quantise_normal<BITS, UNIT, 2>")]
VARIANTS = {
    "base": ([], {}),
    "wide": ([], dict(WHEN=always)),
    "wide normal": ([], dict(WHEN=normal)),
    "wide long": ([], dict(WHEN=long_rows)),
    "wide normal, long": ([], dict(WHEN=normal_long)),
    "wide normal s3": ([gemv4(3, 2)], dict(WHEN=normal, RING=R(3))),
    "r80 s3": ([gemv4(3, 2), *R80], dict(RING=R(3))),
    "r80 s3 early2": ([gemv4(3, 2), *R80, early(2)], dict(RING=R(3))),
    "r80 s4": ([gemv4(4, 2), *R80], {}),
    "L2 256": ([l2(256)], {}),
    "base again": ([], {}),
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
