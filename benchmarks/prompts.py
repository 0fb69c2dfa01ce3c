"""Time to first token of whole prompts, edgeattn beside llama.cpp in one run: a table, and a plot with what was read.

    python benchmarks/prompts.py --peer-python PEERS/bin/python --lengths 4096,8192,16384,32768 --plot ttft.png

Model, files and peers are those of peers.py. llama.cpp reads the longest prompt once, in pieces of 512 tokens as its own tools do, and the
time up to each length is that length's; edgeattn reads each prompt from the start, as the last tokens of a prompt are read otherwise
than those before them. Read: pairs of query and key that attention read, of those that a causal mask leaves, over chunks that were sparse.
Random weights attend nearly evenly, so that `auto` reads the most that it may: a real model is read faster, if at all otherwise.
"""
import argparse
import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from peer_process import Worker, prepare
from peer_table import NAMES, environment
from random_checkpoint import SHAPES, write_checkpoint

from edgeattn.apps.table import markdown

ENGINES = "llama_cpp,edgeattn:int4,edgeattn:int4+auto"
MARKERS = "osD^v"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b")
    parser.add_argument("--lengths", type=lambda text: sorted({int(n) for n in text.split(",")}), default=[4096, 8192, 16384],
                        metavar="N,N")
    parser.add_argument("-r", type=int, default=1, help="repetitions; the fastest counts")
    parser.add_argument("-t", type=int, default=2, help="threads")
    parser.add_argument("--engines", default=ENGINES, help=f"as in peers.py ({ENGINES})")
    parser.add_argument("--peer-python", default=sys.executable, help="the Python that has the peers (edgeattn runs in this one)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "edgeattn-peers", help="folder of model files")
    parser.add_argument("--nice", type=int, default=0, help="priority of every engine; below 0 needs root")
    parser.add_argument("--json", type=Path, help="write every single measurement to this file")
    parser.add_argument("--plot", type=Path, help="draw it to this file (.png or .svg; needs matplotlib)")
    return parser.parse_args()


def measure(args) -> dict[str, list[dict]]:
    """{engine: [{"tokens", "seconds", "read"} of each length]}"""
    folder, found = args.work / args.shape, {}
    checkpoint = write_checkpoint(args.shape, folder / "checkpoint")
    for name in args.engines.split(","):
        python = sys.executable if name.startswith("edgeattn") else args.peer_python
        about = prepare(name, python, checkpoint, folder)
        if "error" in about:
            raise SystemExit(f"{name}: {about['error']}")
        with closing(Worker(name, python, about["path"], max(args.lengths) + 64, args.t, args.nice)) as worker:
            worker.ask("start", vocab=SHAPES[args.shape]["vocab_size"])
            worker.ask("prefill", depth=0, tokens=512)  # a warm-up
            for repeat in range(args.r):
                print(f"{name}, repetition {repeat + 1} of {args.r}", file=sys.stderr, flush=True)
                rows = worker.ask("prompts", lengths=args.lengths)
                found[name] = [min(pair, key=lambda row: row["seconds"]) for pair in zip(found.get(name, rows), rows)]
    return found


def table(found, lengths) -> str:
    names, first = list(found), next(iter(found))
    sparse = [name for name in names if any(row["read"] < 1 for row in found[name])]
    head = ["tokens of the prompt", *(f"{NAMES[name]}, s" for name in names),
            *(f"{NAMES[name]} against {NAMES[first]}" for name in names[1:]), *(f"{NAMES[name]} reads" for name in sparse)]
    rows = [head]
    for i, tokens in enumerate(lengths):
        cells = [f"{tokens:,}", *(f"{found[name][i]['seconds']:.1f}" for name in names)]
        cells += [f"{found[first][i]['seconds'] / found[name][i]['seconds']:.1f}x" for name in names[1:]]
        rows.append(cells + [f"{100 * found[name][i]['read']:.0f} %" for name in sparse])
    return markdown(rows)


def draw(found, lengths, shape, machine, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 6), height_ratios=(3, 1), layout="constrained")
    for marker, (name, rows) in zip(MARKERS, found.items()):
        line, = upper.plot(lengths, [row["seconds"] for row in rows], marker=marker, label=NAMES[name])
        last = rows[-1]["seconds"]
        upper.annotate(f"{last:.0f} s", (lengths[-1], last), xytext=(6, 0), textcoords="offset points", va="center")
        lower.plot(lengths, [100 * row["read"] for row in rows], marker=marker, color=line.get_color())
    upper.set(xscale="log", yscale="log", ylabel="time to first token, s",
              title=f"{shape}, random weights, {machine['threads']} threads of\n{machine['cpu']}")
    upper.legend()
    lower.set(xlabel="tokens of the prompt", ylabel="pairs read, %", ylim=(0, 105), xticks=lengths, xticklabels=[f"{n:,}" for n in lengths])
    lower.minorticks_off()
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main():
    args = arguments()
    try:
        found = measure(args)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    machine = environment(args.t)
    print(f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['features'])}), {machine['threads']} threads; {args.shape}, "
          "random weights.\n")
    print(table(found, args.lengths))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "shape": args.shape, "lengths": args.lengths, "engines": found}, indent=1))
    if args.plot:
        draw(found, args.lengths, args.shape, machine, args.plot)


if __name__ == "__main__":
    main()
