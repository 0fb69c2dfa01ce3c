"""edgeattn beside llama.cpp, onnxruntime-genai and transformers on one machine, in one run, as ratios.

    python -m venv PEERS && PEERS/bin/pip install llama-cpp-python gguf onnxruntime-genai onnxruntime onnx onnx_ir torch transformers
    python benchmarks/peers.py --peer-python PEERS/bin/python

The model is a random-weight checkpoint of Llama-3.2-1B's shape, 4-bit in each engine's own format; transformers runs it in bfloat16. Every
engine runs in a process of its own; repetitions alternate between them, and all but the one at work are stopped, so that noise is shared.
Figures are medians. Nothing is downloaded. Files (about 6 GB) are kept in --work for the next run. --device cuda runs all of them on a GPU;
an engine that is not there, or not built for it, is left out, and the table says why. Linux only.
"""
import argparse
import json
import shutil
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from peer_process import Worker, busy_seconds, prepare
from peer_table import environment, render, summarise
from random_checkpoint import SHAPES, write_checkpoint

ENGINES = ("edgeattn", "llama_cpp", "onnxruntime_genai", "transformers")


def _depths(text):
    if not all(depth.isdigit() for depth in text.split(",")):
        raise argparse.ArgumentTypeError(f"wanted whole numbers such as 0,4096, got {text!r}")
    return sorted({int(depth) for depth in text.split(",")})


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("-p", type=int, default=512, help="tokens of a prompt (0: decode alone)")
    parser.add_argument("-n", type=int, default=32, help="tokens to decode")
    parser.add_argument("-d", type=_depths, default=[0, 4096], metavar="N,N", help="depths: tokens already in the cache")
    parser.add_argument("-r", type=int, default=5, help="repetitions")
    parser.add_argument("-t", type=int, default=2, help="threads")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where all of them run; who cannot is left out")
    parser.add_argument("--engines", default=",".join(ENGINES), help="which, in which order; with a type of the cache llama_cpp:q8_0, "
                        "edgeattn:int4, and with sparse attention edgeattn:int4+auto")
    parser.add_argument("--fill", action="store_true", help="fill caches without computing what is in them: for great depths")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the peers (edgeattn runs in this one)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgeattn-peers", help="folder of model files")
    parser.add_argument("--nice", type=int, default=0, help="priority of every engine; below 0 needs root and hides busy neighbours")
    parser.add_argument("--json", type=Path, help="write every single measurement to this file")
    return parser.parse_args()


def _say(text):
    print(text, file=sys.stderr, flush=True)


def _prepare(args):
    """{engine: what it is} for those that can run; why the others cannot."""
    folder = args.work / args.shape
    _say(f"files in {folder}")
    checkpoint = write_checkpoint(args.shape, folder / "checkpoint")
    ready, left_out = {}, {}
    for name in args.engines.split(","):
        _say(f"{name}: model file")
        about = prepare(name, sys.executable if name.startswith("edgeattn") else args.peer_python, checkpoint, folder, args.device)
        if "error" in about:
            left_out[name] = about["error"]
            _say(f"{name} is left out: {about['error']}")
        else:
            ready[name] = about
    return ready, left_out


def _start(args, workers, ready, depths):
    """Fill `workers` with running processes, the stream-read one first; all stopped."""
    context = max(depths) + max(args.p, args.n) + 64
    workers["stream"] = Worker("stream", sys.executable, "-", context, args.t, args.nice, args.device)
    workers["stream"].ask("start", vocab=0)  # answered once it is ready, so that the next load has the machine to itself
    vocab = SHAPES[args.shape]["vocab_size"]
    for name, about in ready.items():
        _say(f"{name}: load")
        command = name, about["python"], about["path"], context, args.t, args.nice, args.device
        with closing(Worker(*command)) as first:  # fills file and kernel caches
            about["first_load_s"] = first.ask("start", vocab=vocab)["load_s"]
            first.ask("decode" if args.fill else "prefill", depth=0, tokens=2 if args.fill else args.p)
        workers[name] = Worker(*command)
        about |= workers[name].ask("start", vocab=vocab)


def _measure(args, workers, depths):
    """{engine: {"pp512@0": [[seconds], ...]}} of every repetition; the first, a warm-up, is not kept."""
    samples = {name: {} for name in workers}
    for depth in depths:
        for name, worker in workers.items() if args.fill and depth else ():
            if name != "stream":
                _say(f"depth {depth}, fill, {name}")
                worker.ask("fill", depth=depth)
        for repeat in range(-1, args.r):
            for name, worker in workers.items():
                _say(f"depth {depth}, repetition {repeat + 1} of {args.r}, {name}")
                for key, values in _once(args, name, worker, depth).items():
                    if repeat >= 0:
                        samples[name].setdefault(key, []).append(values)
    return samples


def _once(args, name, worker, depth):
    if name == "stream":
        return {"stream": worker.ask("measure")}
    found = {f"pp{args.p}@{depth}": worker.ask("prefill", depth=depth, tokens=args.p)} if args.p else {}
    return found | {f"tg{args.n}@{depth}": worker.ask("decode", depth=depth, tokens=args.n)}


def _own_seconds(workers):
    return sum(worker.cpu_seconds() for worker in workers.values())


def _run(args):
    depths = args.d
    ready, left_out = _prepare(args)
    if not ready:
        _say("no engine can run: see the lines above")
        return 2
    workers = {}
    try:
        _start(args, workers, ready, depths)
        start, busy, own = time.perf_counter(), busy_seconds(), _own_seconds(workers)
        samples = _measure(args, workers, depths)
        others = (busy_seconds() - busy - _own_seconds(workers) + own) / (time.perf_counter() - start)
        for name, about in ready.items():
            about["memory"] = workers[name].ask("memory")
    finally:
        for worker in workers.values():
            worker.close()
    machine = environment(args.t, args.device) | {"busy_with_others": others}
    rows = summarise(SHAPES[args.shape], args, depths, ready, samples)
    print(render(args, machine, ready, left_out, rows))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "shape": args.shape, "engines": ready, "left_out": left_out,
                                         "rows": rows, "seconds": samples}, indent=1))
    return 0


def main() -> int:
    args = _arguments()
    unknown = [name for name in args.engines.split(",") if name.partition(":")[0] not in ENGINES]
    if unknown:
        _say(f"--engines {','.join(unknown)}: wanted some of {','.join(ENGINES)}")
        return 2
    if shutil.which(args.peer_python) is None:
        _say(f"--peer-python {args.peer_python}: no such program; make it with `python -m venv` and install the peers there")
        return 2
    try:
        return _run(args)
    except RuntimeError as error:
        _say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
