"""Times matmul_ternary at the shapes of BitNet-2B: python benchmarks/ternary.py [-t THREADS] [--tokens 1,512] [--repeats N]

Random ternary weights, in as many copies as no cache holds. Each round times, turn by turn: our kernel, a plain prefetched read of the
same bytes (few tokens), onnxruntime's 2-bit MatMulNBits (accuracy_level 4, blocks of 128, one scale an output repeated). Both products
include the rounding of activations. Medians; ratios are those of medians.
"""
import argparse
from time import perf_counter

import numpy as np
import onnxruntime
from cpu_kernels import FOOTPRINT, read_step, rows, seconds
from numba import get_num_threads, set_num_threads
from onnx import TensorProto, helper, numpy_helper

from edgeattn.kernels_cpu import LEVEL
from edgeattn.kernels_cpu.matmul_ternary import ARGS, step, workspace_bytes
from edgeattn.kernels_cpu.steps import Tensor, aligned, resolve
from edgeattn.reference.matmul_ternary import pack_ternary

SHAPES = {"qkv": (3840, 2560), "o": (2560, 2560), "gate and up": (13824, 2560), "down": (2560, 6912)}  # N, K


class Ours:
    """form: bits, or "inputs" for weights stored input by input."""

    def __init__(self, tokens, n, k, x, rng, form):
        about = dict(bits=2, input_major=1) if form == "inputs" else dict(bits=int(form), input_major=0)
        self.state, self.keep, self.tables, self.reads = np.array([tokens], np.int64), [], [], []
        codes = pack_ternary(rng.integers(-1, 2, (n, k), np.int8), **about)
        self.nbytes = codes.nbytes
        for _ in range(max(1, FOOTPRINT // codes.nbytes) if tokens < 16 else 1):
            mine, scales, out = aligned(codes.shape, np.uint8), np.ones(n, np.float32), aligned((tokens, n), np.float32)
            mine[:] = codes
            tensors = {name: Tensor.of(v, rows="tokens" if name in ("x", "out") else None)
                       for name, v in dict(x=x, out=out, codes=mine, scales=scales).items()}
            attributes = dict(activation_bits=8, K=k, N=n, **about)
            scratch = aligned(workspace_bytes(tensors, attributes, tokens, get_num_threads()), np.uint8)
            sums = aligned(16 * get_num_threads(), np.int32)
            self.tables.append(rows(step, resolve(ARGS, tensors, attributes, ("tokens",), {"workspace": scratch.ctypes.data})))
            self.reads.append(rows(read_step, [mine.ctypes.data, mine.nbytes // 4, sums.ctypes.data]))
            self.keep += [mine, scales, out, scratch, sums]

    def run(self, i):
        return seconds(self.tables[i % len(self.tables)], self.state)

    def read(self, i):
        return seconds(self.reads[(i + len(self.reads) // 2) % len(self.reads)], self.state)


class OnnxRuntime:
    def __init__(self, tokens, n, k, x, rng, threads):
        blocks = k // 128
        self.sessions, self.feeds = [], dict(x=x)
        for _ in range(max(1, FOOTPRINT // (n * k // 4)) if tokens < 16 else 1):
            node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=2, block_size=128,
                                    accuracy_level=4)
            tensors = [numpy_helper.from_array(rng.integers(0, 256, (n, blocks, 32), np.uint8), "b"),
                       numpy_helper.from_array(np.ones((n, blocks), np.float32), "s")]
            graph = helper.make_graph([node], "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, k])],
                                      [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, n])], tensors)
            opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
            model = helper.make_model(graph, ir_version=11, opset_imports=opsets)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self.sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]))

    def run(self, i):
        session = self.sessions[i % len(self.sessions)]
        start = perf_counter()
        session.run(None, self.feeds)
        return perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-t", "--threads", type=int, default=0, help="threads (default: all)")
    parser.add_argument("--tokens", default="1,4,512")
    parser.add_argument("--forms", default="2,1,inputs", help="2 bits, 1 (five weights to a byte), inputs (2 bits, stored input by input)")
    parser.add_argument("--zeros", type=float, default=0.8, help="share of zeros in the input of down")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-onnxruntime", action="store_true")
    options = parser.parse_args()
    if options.threads:
        set_num_threads(options.threads)
    threads, rng = get_num_threads(), np.random.default_rng(0)
    print(f"{LEVEL}, {threads} threads")
    print(f"{'':12} {'N':>6} {'K':>5} {'tokens':>6} {'form':>6} {'us':>8} {'GFLOP/s':>8} {'GB/s':>6} {'read':>6} share "
          f"{'onnxruntime us':>15} ratio")
    for tokens in map(int, options.tokens.split(",")):
        for name, (n, k) in SHAPES.items():
            x = aligned((tokens, k), np.float32)
            x[:] = rng.standard_normal(x.shape)
            forms = [form for form in options.forms.split(",") if form != "inputs" or name == "down"]
            if name == "down":
                x *= rng.random(x.shape) >= options.zeros
            ours = [Ours(tokens, n, k, x, rng, form) for form in forms]
            peer = None if options.no_onnxruntime else OnnxRuntime(tokens, n, k, x, rng, threads)
            runs = [run for each in ours for run in (each.run, each.read)] + ([peer.run] if peer else [])
            times = np.median([[run(i) for run in runs] for i in range(options.repeats + 3)][3:], axis=0) * 1e6
            for i, each in enumerate(ours):
                mine, read = times[2 * i:2 * i + 2]
                print(f"{name:12} {n:6} {k:5} {tokens:6} {forms[i]:>6} {mine:8.1f} {2e-3 * tokens * n * k / mine:8.0f} "
                      f"{each.nbytes / mine / 1e3:6.1f} {each.nbytes / read / 1e3:6.1f} {read / mine:5.2f} "
                      + (f"{times[-1]:15.1f} {times[-1] / mine:5.2f}" if peer else ""), flush=True)


if __name__ == "__main__":
    main()
