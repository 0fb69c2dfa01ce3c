"""Prefill and decode of BitNet-2B's shape beside llama.cpp's TQ2_0.

    python benchmarks/ternary_model.py EXPORT... --gguf FILE --peer-python PYTHON

PYTHON has llama-cpp-python and gguf. The files are made by

    python benchmarks/random_checkpoint.py bitnet-2b CHECKPOINT
    edgeattn export CHECKPOINT -o EXPORT --ternary-layout dense
    PYTHON benchmarks/gguf_ternary.py FILE

Engines take turns, each turn a process of its own: 512 tokens into an empty cache, then 32 tokens one by one. Medians over the rounds.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter

PROMPT = [1 + i * 7919 % 1000 for i in range(512)]


def turn(kind, path, threads):
    """Tokens per second of the prompt and of single tokens."""
    if kind == "edgeattn":
        from engine_edgeattn import Engine
    else:
        from engine_llama_cpp import Engine
    engine = Engine(path, 1024, threads, "")
    seconds = []
    for _ in range(2):  # the first is a warm-up
        engine.truncate(0)
        start = perf_counter()
        engine.forward(PROMPT)
        seconds.append(perf_counter() - start)
    steps = []
    for token in range(32):
        start = perf_counter()
        engine.forward([token])
        steps.append(perf_counter() - start)
    return len(PROMPT) / seconds[-1], 1 / statistics.median(steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="*")
    parser.add_argument("--gguf")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        print(json.dumps(turn(*options.turn, options.threads)))
        return
    engines = [(sys.executable, "edgeattn", path) for path in options.exports]
    engines += [(options.peer_python, "llama.cpp", options.gguf)] if options.gguf else []
    found = {engine: [] for engine in engines}
    for _ in range(options.rounds):
        for python, kind, path in engines:
            command = [python, __file__, "--turn", kind, path, "-t", str(options.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{kind} {path}: {done.stderr.strip().splitlines()[-1]}")
            found[python, kind, path].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':24} {'prefill tokens/s':>16} {'decode tokens/s':>16}   (lowest ... highest of {options.rounds})")
    for (_, kind, path), rates in found.items():
        columns = [f"{statistics.median(r):7.1f} ({min(r):.1f} ... {max(r):.1f})" for r in zip(*rates)]
        print(f"{kind + ' ' + Path(path).name:24} {columns[0]:>24} {columns[1]:>24}")


if __name__ == "__main__":
    main()
