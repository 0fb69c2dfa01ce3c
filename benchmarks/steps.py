"""Where a forward call's time goes: python benchmarks/steps.py FOLDER [-p TOKENS] [-d DEPTH] [-r N]

Median milliseconds per kind of node (all layers together), of the whole call, and the share of it spent outside the plan. An
export of a random checkpoint (benchmarks/random_checkpoint.py) will do. `-p 1` is a decode step.
"""
import argparse
import time
from collections import defaultdict

import numpy as np

from edgeattn.runtime import Model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("-p", type=int, default=1, help="tokens computed at once, at most 512")
    parser.add_argument("-d", type=int, default=0, help="tokens in the cache before")
    parser.add_argument("-r", type=int, default=10, help="repetitions")
    args = parser.parse_args()
    model, rng = Model.load(args.folder, ctx_size=args.d + args.p), np.random.default_rng(0)
    sequence, ids = model.new_sequence(), rng.integers(0, model.vocab_size, args.p)
    if args.d:
        model.forward([(sequence, rng.integers(0, model.vocab_size, args.d))], "none")
    plan, whole, inside, kinds = model.plan, [], [], defaultdict(list)
    run = plan.run

    def timed(state, before_attention=None):
        start = time.perf_counter()
        run(state, before_attention)
        inside.append(time.perf_counter() - start)
    plan.run = timed
    for _ in range(args.r + 1):
        start = time.perf_counter()
        model.forward([(sequence, ids)])
        whole.append(time.perf_counter() - start)
        found = defaultdict(float)
        for node, _, seconds in plan.profile(model._batch.state):
            found[node.rpartition(".")[2]] += seconds
        for kind, seconds in found.items():
            kinds[kind].append(seconds)
        model.truncate(sequence, args.d)
    for kind, seconds in sorted(kinds.items(), key=lambda item: -np.median(item[1][1:])):
        print(f"{kind:20} {1e3 * np.median(seconds[1:]):9.3f} ms")
    outside = np.array(whole[1:]) - inside[1:]
    print(f"{'whole call':20} {1e3 * np.median(whole[1:]):9.3f} ms, of which outside the plan {100 * np.median(outside / whole[1:]):.1f} %")


if __name__ == "__main__":
    main()
