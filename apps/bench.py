"""edgeattn bench: rows like llama-bench's, with latency, memory, power and the share of the machine's bandwidth."""
import argparse
import contextlib
import json
import subprocess
import sys

from edgeattn.apps import axes, options
from edgeattn.apps.bench_report import FORMATS, Row, Test, make_report

HELP = "measure prompt and generation speed, latency, memory, bandwidth and power"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for flag, name, default, text in (("-p", "--n-prompt", 512, "prompt lengths; 0 for none"),
                                      ("-n", "--n-gen", 128, "tokens to generate; 0 for none"),
                                      ("-d", "--n-depth", 0, "tokens in the cache before a test")):
        parser.add_argument(flag, name, type=options.numbers(0), default=[default], metavar="N[,N]", help=f"{text} ({default})")
    parser.add_argument("-pg", type=_pair, action="append", default=[], metavar="P,N", help="a prompt of P tokens and then N to generate, "
                        "timed as one; may be repeated")
    parser.add_argument("-r", "--repetitions", type=options.whole(1), default=5, metavar="N", help="times each test runs (5)")
    parser.add_argument("--delay", type=options.whole(0), default=0, metavar="S", help="seconds of rest before each test (0)")
    parser.add_argument("--no-warmup", action="store_true", help="time the first run of each test too")
    parser.add_argument("--progress", action="store_true", help="say on stderr which test runs, also where that is no terminal")
    parser.add_argument("-o", "--output", choices=FORMATS, default="md", help="format of the rows (md); md, csv, jsonl: each is written when "
                        "it is measured")
    axes.add_model(parser)
    parser.epilog = ("Flags of the model, the KV cache and sparse attention take several values with commas between them: every combination "
                     "is measured, in a process of its own, so that each has its own peak of memory.")


def _pair(text):
    found = options.numbers(1)(text)
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"must be two numbers, of a prompt and of what to generate, got {text!r}")
    return tuple(found)


def main(args: argparse.Namespace) -> int:
    tests = [Test(depth, n_prompt, n_gen) for depth in args.n_depth for n_prompt, n_gen in
             [*((n, 0) for n in args.n_prompt if n), *((0, n) for n in args.n_gen if n), *args.pg]]
    if not tests:
        raise ValueError("nothing to measure: give -p N or -n N above 0")
    settings = axes.expand(args)
    longest = max(test.tokens for test in tests)
    for _, one in settings:  # a mistake in the last of them must not wait for the others
        axes.check(one)
        _check_room(one, tests)
    labels = [axes.setting(one) for _, one in settings] if len(settings) > 1 else []
    report = make_report(args.output, sys.stdout, labels)
    with contextlib.closing(report):
        if len(settings) > 1:
            return _each_apart(args, settings, report)
        from edgeattn.apps.bench_run import Bench
        (_, one), = settings
        bench = Bench(one, one.ctx_size or longest)
        with contextlib.closing(bench):
            if args.output == "md" and bench.missing:
                print(f"not measured here: {bench.missing}", file=sys.stderr)
            for row in bench.rows(tests):
                report.add(row)
    return 0


def _check_room(args, tests):
    """ValueError: a test needs more context than there is."""
    from edgeattn.apps import models
    from edgeattn.runtime import read_config
    allowed = read_config(models.exported(args.model, args.precision))["model"]["ctx_size"]
    allowed, most = min(args.ctx_size or allowed, allowed), max(tests, key=lambda test: test.tokens)
    if most.tokens > allowed:
        raise ValueError(f"depth {most.depth} and {most.tokens - most.depth} tokens need a context of {most.tokens}, there are {allowed}; "
                         f"lower -d, -p or -n{', or raise -c' if args.ctx_size else ''}")


def _each_apart(args, settings, report):
    """Every setting in a process of its own, whose memory is nobody else's."""
    from edgeattn.apps import record
    failed = []
    for i, (label, one) in enumerate(settings, 1):
        if args.progress:
            print(f"setting {i} of {len(settings)}: {label}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "edgeattn.apps.cli", "bench", *_arguments(args), *axes.arguments(one)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                report.add(Row(**json.loads(line) | {"command": record.command()}))
        if process.returncode:
            failed.append(label)
    if failed:
        print(f"edgeattn bench: {len(failed)} of {len(settings)} settings failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _arguments(args):
    """What a process needs to be told besides its setting."""
    lists = {"-p": args.n_prompt, "-n": args.n_gen, "-d": args.n_depth}
    found = [part for flag, values in lists.items() for part in (flag, ",".join(map(str, values)))]
    found += [part for pair in args.pg for part in ("-pg", f"{pair[0]},{pair[1]}")]
    found += ["-r", str(args.repetitions), "--delay", str(args.delay), "-o", "jsonl"]
    return found + [flag for flag, given in (("--no-warmup", args.no_warmup), ("--progress", args.progress)) if given]
