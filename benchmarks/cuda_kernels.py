"""The dense CUDA kernels, measured on the GPU at hand: medians with CUDA events, inputs larger than its L2, beside the bandwidth of a copy.

    python benchmarks/cuda_kernels.py            (sh benchmarks/gpu.sh python3 benchmarks/cuda_kernels.py where edgeattn is not installed)

"alone" is one launch between two events; "chain" one of many launches on different weights in a CUDA graph, as in a decode step, where a
kernel starts while the one before ends. Every kernel is compared with float64 on the same weights first.
"""
import argparse
import json
from time import perf_counter

import numpy as np

from edgeattn.backend_cuda import Step
from edgeattn.kernels_cuda import add, device, fused_steps, gated_activation, linear, matmul_nbits, rms_normalization, sample, steps
from edgeattn.reference.matmul_nbits import unpack_panels

SHAPES = [  # N, K, bits: 8B's, then those of a 1B model's layer and its head, and 8B's of fewer bits
    (4096, 14336, 4), (14336, 4096, 4), (4096, 4096, 4), (4096, 14336, 8),
    (3072, 2048, 4), (2048, 2048, 4), (16384, 2048, 4), (2048, 8192, 4), (128256, 2048, 8), (4096, 14336, 3), (4096, 14336, 2)]
WARM = 0.1  # seconds
GEMM_TOKENS = (16, 64, 512, 2048)


def median_us(run, repeat, per=1):
    """Median over `repeat` of the time between two events around run(i), in us, divided by `per`; WARM seconds of it before."""
    cuda, times, begun, i = device.cupy().cuda, [], perf_counter(), 0
    stream = cuda.get_current_stream()
    while i < 3 or perf_counter() - begun < WARM:
        run(i)
        i += 1
        if i % 16 == 0:
            stream.synchronize()
    for i in range(repeat):
        start, end = cuda.Event(), cuda.Event()
        start.record(stream)
        run(i)
        end.record(stream)
        end.synchronize()
        times.append(cuda.get_elapsed_time(start, end) * 1e3 / per)
    return float(np.median(times))


def copy_bandwidth(repeat):
    """GB/s of a device-to-device copy of 1 GiB, read and write counted."""
    cp = device.cupy()
    source, target = cp.empty(1 << 30, np.uint8), cp.empty(1 << 30, np.uint8)
    source[:] = 7
    return 2 * source.nbytes / median_us(lambda i: cp.copyto(target, source), repeat) / 1e3


def random_bytes(count):
    """On the device, without a random number library: 16 MiB from NumPy, over and over from different places."""
    cp, size = device.cupy(), 1 << 24
    random_bytes.base = getattr(random_bytes, "base", None)
    if random_bytes.base is None:
        random_bytes.base = cp.asarray(np.random.default_rng().integers(0, 256, size, np.uint8))
    start = int(np.random.default_rng().integers(0, size))
    return cp.tile(cp.roll(random_bytes.base, start), -(-count // size))[:count]


def normal(*shape):
    return device.cupy().asarray(np.random.default_rng().standard_normal(shape, np.float32))


class Weights:
    """Random block-quantised weights on the device."""

    def __init__(self, n, k, bits, block):
        self.n, self.k, self.bits, self.block = n, k, bits, block
        panels, blocks = -(-n // 16), -(-k // block)
        self.codes = random_bytes(panels * blocks * block * bits * 2).reshape(panels, blocks, block * bits // 32, 16, 4)
        scales = random_bytes(panels * blocks * 16).reshape(panels, blocks, 16).astype(np.float32)
        self.scales = ((scales + 128) / (256 << bits)).astype(np.float16)
        self.nbytes = self.codes.nbytes + self.scales.nbytes

    def rows(self, count):
        """The first `count` of them as float64 [count, K]."""
        cp, panels = device.cupy(), -(-count // 16)
        about = dict(bits=self.bits, block_size=self.block, K=self.k, N=count)
        return cp.asarray(unpack_panels(self.codes[:panels].get(), self.scales[:panels].get(), **about), np.float64)

    def arguments(self, x, out, state, scratch):
        about = dict(bits=self.bits, block_size=self.block, K=self.k, N=self.n)
        return dict.fromkeys(matmul_nbits.ARGS, 0) | about | {
            "x": x.data.ptr, "x.rows": 0, "x.stride": x.shape[1], "codes": self.codes.data.ptr, "scales": self.scales.data.ptr,
            "out": out.data.ptr, "out.stride": out.shape[1], "workspace": scratch.data.ptr, "state": state.data.ptr}

    def launches(self, x, out, state, scratch, tokens):
        return matmul_nbits.launches(self.arguments(x, out, state, scratch), {0: tokens})


def check(weights, x, out):
    """Relative error against float64 on rounded activations, of the first and last tokens and the first outputs."""
    cp, count, some = device.cupy(), min(256, weights.n), [0, len(x) // 2, len(x) - 1]
    x, tokens = x[some], len(x)
    blocks = x.astype(np.float32).reshape(len(x), -1, weights.block)
    scale = cp.maximum(cp.abs(blocks).max(-1, keepdims=True), np.float32(1e-20)) / np.float32(127)
    rounded = (cp.rint(blocks / scale).astype(np.float64) * scale).reshape(len(x), -1)
    expected = (rounded[:, None] * weights.rows(count)[None]).sum(-1)
    error = float(cp.sqrt(cp.square(out[some, :count] - expected).sum() / cp.square(expected).sum()))
    if not error < 1e-5:
        raise SystemExit(f"matmul_nbits {weights.n}x{weights.k} of {weights.bits} bits, {tokens} tokens: relative error {error}")


def matmul(n, k, bits, block, tokens, repeat):
    """(us alone, us in a chain, bytes of weights) of one shape."""
    cp, l2 = device.cupy(), device.about()["l2_bytes"]
    first = Weights(n, k, bits, block)
    count = max(2, -(-2 * l2 // first.nbytes))
    sets = [first] + [Weights(n, k, bits, block) for _ in range(count - 1)]
    x = normal(tokens, k)
    out, state = cp.full((tokens, n), np.nan, np.float32), cp.array([tokens], np.int64)
    scratch = cp.empty(matmul_nbits.workspace_bytes({}, dict(bits=bits, K=k, block_size=block), tokens, 1), np.uint8)
    each = [w.launches(x, out, state, scratch, tokens) for w in sets]
    steps.run(each[0])
    check(first, x, out)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        graphs = [steps.Graph(launches, stream) for launches in each]
        alone = median_us(lambda i: graphs[i % count].launch(), repeat)
        chain = steps.Graph([launch for launches in each for launch in launches], stream)
        chained = median_us(lambda i: chain.launch(), repeat, count)
    return alone, chained, first.nbytes


def linear_us(n, k, tokens, repeat):
    """us of float16 weights in a chain."""
    cp = device.cupy()
    count = max(2, 2 * device.about()["l2_bytes"] // (2 * n * k) + 1)
    sets = [(random_bytes(2 * n * k) & 0x3f).view(np.float16).reshape(n, k) for _ in range(count)]
    x, out, state = normal(tokens, k), cp.empty((tokens, n), np.float32), cp.array([tokens], np.int64)
    a = {"x": x.data.ptr, "x.rows": 0, "x.stride": k, "weight.type": 1, "weight.0": n, "weight.1": k, "weight.stride": k, "bias": 0,
         "out": out.data.ptr, "out.stride": n, "state": state.data.ptr}
    chain = steps.Graph([launch for w in sets for launch in linear.launches(a | {"weight": w.data.ptr}, {0: tokens})])
    with chain.stream:
        return median_us(lambda i: chain.launch(), repeat, len(sets))


def sample_us(vocab, repeat, **options):
    """us of one token out of `vocab` logits, as a graph."""
    cp = device.cupy()
    settings = dict(temperature=0.8, top_p=1.0, min_p=0.0, repeat_penalty=1.1, uniform=0.7, top_k=0) | options
    logits, history, token, state = normal(vocab) * 3, cp.arange(64, dtype=np.int64), cp.zeros(1, np.int64), cp.array([64], np.int64)
    scratch = cp.empty(sample.workspace_bytes({"logits": logits}, {}, 1, 1), np.uint8)
    values = cp.asarray(np.array([settings[name] for name in sample.SETTINGS]))
    graph = steps.Graph(sample.launches({
        "logits": logits.data.ptr, "logits.0": vocab, "history": history.data.ptr, "history.rows": 0, "settings": values.data.ptr,
        "token": token.data.ptr, "workspace": scratch.data.ptr, "state": state.data.ptr}, {0: 64}))
    with graph.stream:
        return median_us(lambda i: graph.launch(), repeat)


class DecodeStep:
    """All dense operators of one token through `layers` layers of the 1B shape and the head; attention is not among them."""

    def __init__(self, layers, block, width=2048, q=2048, kv=512, hidden=8192, vocab=128256):
        cp = device.cupy()
        self.state, self.scratch = cp.array([1], np.int64), cp.empty(1 << 20, np.uint8)
        self.x, self.normal, self.product, self.sum, self.qkv, self.wide, self.half, self.logits = (
            normal(1, n) for n in (width, width, width, width, q + 2 * kv, 2 * hidden, hidden, vocab))
        self.gain, self.block, self.weights, self.steps = cp.ones(width, np.float32), block, [], []
        for _ in range(layers):
            self._norm()
            self._matmul(q + 2 * kv, width, 4, self.normal, self.qkv)
            self._matmul(width, q, 4, self.qkv, self.product)
            self._add(self.x, self.product, self.sum)
            self._norm(self.sum)
            self._matmul(2 * hidden, width, 4, self.normal, self.wide)
            self._step("gated_activation", gated_activation, self._row(self.wide) | {
                "out": self.half.data.ptr, "out.stride": hidden, "activation": 0})
            self._matmul(width, hidden, 4, self.half, self.product)
            self._add(self.sum, self.product, self.x)
        self._norm()
        self._matmul(vocab, width, 8, self.normal, self.logits)
        self.bytes, most = sum(w.nbytes for w in self.weights), {0: 1}
        self.launches, self.fused = ([launch for step in some for launch in step.kernel.launches(step.arguments, most)]
                                     for some in (self.steps, fused_steps.fuse(self.steps, most)))

    def _row(self, x):
        return {"x": x.data.ptr, "x.rows": 0, "x.stride": x.shape[1], "x.width": x.shape[1], "x.groups": 1, "state": self.state.data.ptr}

    def _step(self, operator, kernel, arguments):
        self.steps.append(Step("", operator, kernel, arguments, 0))

    def _norm(self, x=None):
        epsilon, x = int(np.float32(1e-5).view(np.int32)), self.x if x is None else x
        self._step("rms_normalization", rms_normalization, self._row(x) | {
            "weight": self.gain.data.ptr, "out": self.normal.data.ptr, "out.stride": x.shape[1], "epsilon": epsilon})

    def _add(self, x, y, out):
        self._step("add", add, self._row(x) | {"y": y.data.ptr, "y.stride": y.shape[1], "out": out.data.ptr, "out.stride": out.shape[1]})

    def _matmul(self, n, k, bits, x, out):
        self.weights.append(Weights(n, k, bits, self.block))
        self._step("matmul_nbits", matmul_nbits, self.weights[-1].arguments(x, out, self.state, self.scratch))

    def measure(self, repeat):
        """us of the step as a graph: fused, when no token is there, each step by itself, and those without overlap; time_in_kernels of the
        first and the last."""
        cp = device.cupy()
        stream = cp.cuda.Stream(non_blocking=True)
        with stream:
            graph, single = steps.Graph(self.fused, stream), steps.Graph(self.launches, stream)
            apart = steps.Graph([steps.replace(launch, overlap=False) for launch in self.launches], stream)
            step, each, serial = (median_us(lambda i, g=g: g.launch(), repeat) for g in (graph, single, apart))
            profiled = [time_in_kernels(g.launch, stream) for g in (graph, apart)]
            self.state[0] = 0
            empty = median_us(lambda i: graph.launch(), repeat)
            self.state[0] = 1
        return step, empty, each, serial, profiled


def time_in_kernels(launch, stream):
    """(share of a replay in which some kernel runs, {kernel: us of a replay}) by torch's profiler; None where there is no torch."""
    try:
        from torch.profiler import ProfilerActivity, profile
    except ImportError:
        return None
    replays = 10
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(replays):
            launch()
            stream.synchronize()
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in profiled.events() if e.device_type.name == "CUDA")
    each, covered, total, per = len(spans) // replays, 0.0, 0.0, {}
    for i in range(0, each * replays, each):
        reached = begun = spans[i][0]
        for start, end, name in spans[i:i + each]:
            covered += max(0.0, end - max(start, reached))
            reached = max(reached, end)
            per[name] = per.get(name, 0.0) + (end - start) / replays
        total += reached - begun
    return covered / total, per


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-r", "--repeat", type=int, default=50)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--block", type=int, default=32, help="K of a block of weights: 32, or 128 as most GPTQ and AWQ have it")
    parser.add_argument("--json", help="also write the figures there")
    options = parser.parse_args()
    about, copied, figures = device.about(), copy_bandwidth(20), []
    print(about)
    print(f"copy {copied:.0f} GB/s")
    print("tokens       N      K bits  alone us  chain us                    ms at 102, 205 GB/s")
    for tokens in (1, 4, 8, *GEMM_TOKENS):
        shapes = SHAPES if tokens == 1 else [SHAPES[i] for i in ((0, 8, 9, 10) if tokens <= 8 else (0, 6, 7, 9, 10))]
        for n, k, bits in shapes:
            alone, chained, size = matmul(n, k, bits, options.block, tokens, options.repeat)
            line = f"{tokens:6} {n:7} {k:6} {bits:4} {alone:9.2f} {chained:9.2f} "
            if tokens > 8:
                print(line + f"{2 * n * k * tokens / chained / 1e6:6.1f} TOP/s")
            else:
                rate = size / chained / 1e3
                print(line + f"{rate:6.0f} GB/s {rate / copied:5.0%} of copy {size / 102e6:7.3f} {size / 205e6:6.3f}")
            figures.append(dict(tokens=tokens, n=n, k=k, bits=bits, alone_us=alone, chain_us=chained, bytes=size))
    for n, k, tokens in ((4096, 14336, 1), (4096, 14336, 8), (4096, 4096, 512)):
        us = linear_us(n, k, tokens, options.repeat)
        print(f"float16 {tokens} x {n} x {k}: {us:.2f} us, {2 * n * k / us / 1e3:.0f} GB/s, {2 * n * k * tokens / us / 1e6:.1f} TFLOP/s")
        figures.append(dict(linear=[tokens, n, k], us=us))
    for chosen in (dict(temperature=0), dict(top_k=40, top_p=0.95), dict(top_p=0.9), dict()):
        us = sample_us(128256, options.repeat, **chosen)
        print(f"sample of 128,256 with {chosen or 'no filter'}: {us:.1f} us")
        figures.append(dict(sample=chosen, us=us))
    made = DecodeStep(options.layers, options.block)
    step, empty, each, serial, profiled = made.measure(options.repeat)
    rate = made.bytes / step / 1e3
    print(f"step of {options.layers} layers and the head, {len(made.fused)} kernels, {made.bytes / 1e6:.0f} MB: {step:.1f} us, "
          f"{rate:.0f} GB/s ({rate / copied:.0%} of copy), with no token {empty:.1f} us; by {len(made.launches)} kernels {each:.1f} us, "
          f"without overlap {serial:.1f} us")
    for name, found in zip(("fused", "apart"), profiled):
        if found:
            each = ", ".join(f"{kernel} {us:.1f}" for kernel, us in sorted(found[1].items()))
            print(f"{name}: a kernel runs {found[0]:.1%} of the step; us of each: {each}")
    figures.append(dict(step_us=step, empty_us=empty, each_us=each, serial_us=serial, bytes=made.bytes, kernels=len(made.fused),
                        in_kernels=profiled))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(device=about, copy_gbs=copied, figures=figures), file, indent=1)


if __name__ == "__main__":
    main()
