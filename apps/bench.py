"""edgeattn bench: rows like llama-bench's, with latency, memory, power and the share of the machine's bandwidth."""
import argparse
import contextlib
import itertools
import json
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

from edgeattn.apps import axes, options
from edgeattn.apps.bench_report import FORMATS, Row, Trial, make_report

HELP = "measure prompt and generation speed, latency, memory, bandwidth and power"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for flag, name, default, text in (("-p", "--n-prompt", 512, "prompt lengths; 0 for none"),
                                      ("-n", "--n-gen", 128, "tokens to generate; 0 for none"),
                                      ("-d", "--n-depth", 0, "tokens in the cache before a test")):
        parser.add_argument(flag, name, type=options.numbers(0), default=[default], metavar="N[,N]", help=f"{text} ({default})")
    parser.add_argument("-pg", type=_pair, action="append", default=[], metavar="P,N", help="a prompt of P tokens and then N to generate, "
                        "timed as one; may be repeated")
    parser.add_argument("--tests", type=_tests, help=argparse.SUPPRESS)  # how a process is told what is left of another's work
    parser.add_argument("-r", "--repetitions", type=options.whole(1), default=5, metavar="N", help="times each test runs (5)")
    parser.add_argument("--delay", type=options.whole(0), default=0, metavar="S", help="seconds of rest before each test (0)")
    parser.add_argument("--no-warmup", action="store_true", help="time the first run of each test too")
    parser.add_argument("--progress", action="store_true", help="say on stderr which test runs, also where that is no terminal")
    parser.add_argument("-o", "--output", choices=FORMATS, default="md", help="format of the rows (md); all but html "
                        "are written row by row")
    parser.add_argument("--out", metavar="FILE.jsonl", help="add rows to a file as they are made; what it holds is not measured again")
    axes.add_model(parser)
    parser.epilog = ("Flags of the model, the KV cache and sparse attention take several values with commas between them: every "
                     "combination is measured, in a process of its own, so that each has its own peak of memory.")


def _pair(text):
    found = options.numbers(1)(text)
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"must be two numbers, of a prompt and of what to generate, got {text!r}")
    return tuple(found)


def _tests(text):
    longest, _, tests = text.partition("/")
    return int(longest), [Trial.parse(part) for part in tests.split(",")]


def main(args: argparse.Namespace) -> int:
    longest, tests = args.tests or (0, [Trial(depth, n_prompt, n_gen) for depth in args.n_depth for n_prompt, n_gen in
                                        [*((n, 0) for n in args.n_prompt if n), *((0, n) for n in args.n_gen if n), *args.pg]])
    if not tests:
        raise ValueError("nothing to measure: give -p N or -n N above 0")
    longest = max(longest, *(test.tokens for test in tests))  # auto's choices depend on the context, whatever is left to measure
    settings = [one for _, one in axes.expand(args)]
    for one in settings:  # a mistake in the last of them must not wait for the others
        axes.check(one)
        _check_room(one, tests)
    if args.out:
        from edgeattn.apps import record
        record.ready(args.out)
    kept = Kept(args.out)
    labels = [axes.setting(one) or "defaults" for one in settings]
    report = make_report(args.output, sys.stdout, labels if len(settings) > 1 else [], [test.name for test in tests])
    failed = []
    with contextlib.closing(report):
        for i, (label, one) in enumerate(zip(labels, settings), 1):
            known = kept.rows(one, args.repetitions)
            for row in known.values():
                if row.test in {test.name for test in tests}:
                    report.add(row)
            missing = [test for test in tests if test.name not in known]
            if args.progress and len(settings) > 1:
                print(f"setting {i} of {len(settings)}: {label}", file=sys.stderr, flush=True)
            try:
                for row in (_apart if len(settings) > 1 else _here)(args, one, missing, longest):
                    kept.add(row)
                    report.add(row)
            except subprocess.CalledProcessError:  # it has said why
                failed.append(label)
    if failed:
        print(f"edgeattn bench: {len(failed)} of {len(settings)} settings failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _check_room(args, tests):
    """ValueError: a test needs more context than there is."""
    from edgeattn.apps import models
    from edgeattn.runtime import read_config
    allowed = read_config(models.exported(args.model, args.precision))["model"]["ctx_size"]
    allowed, most = min(args.ctx_size or allowed, allowed), max(tests, key=lambda test: test.tokens)
    if most.tokens > allowed:
        raise ValueError(f"depth {most.depth} and {most.tokens - most.depth} tokens need a context of {most.tokens}, there are {allowed}; "
                         f"lower -d, -p or -n{', or raise -c' if args.ctx_size else ''}")


def _here(args, one, tests, longest):
    if not tests:
        return
    from edgeattn.apps.bench_run import Bench
    with contextlib.closing(Bench(one, one.ctx_size or longest)) as bench:
        if args.output == "md" and bench.missing:
            print(f"not measured here: {bench.missing}", file=sys.stderr)
        yield from bench.rows(tests)


def _apart(args, one, tests, longest):
    """In a process of its own, whose memory is nobody else's; in a second one where the first had to compile kernels."""
    if not tests:
        return
    from edgeattn import kernels_cpu
    from edgeattn.apps import record
    flags = [flag for flag, given in (("--no-warmup", args.no_warmup), ("--progress", args.progress)) if given]
    command = [sys.executable, "-m", "edgeattn.apps.cli", "bench", "--tests", f"{longest}/{','.join(map(str, tests))}",
               "-r", str(args.repetitions), "--delay", str(args.delay), *flags, "-o", "jsonl", *axes.arguments(one)]
    compiled = kernels_cpu.cached_kernels()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        again = bool(first) and kernels_cpu.cached_kernels() > compiled
        if again:
            process.kill()
        for line in [] if again else filter(None, itertools.chain([first], process.stdout)):
            yield Row(**json.loads(line) | {"command": record.command()})
    if again:
        yield from _apart(args, one, tests, longest)
    elif process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


class Kept:
    """The rows of --out. ValueError: the file holds something else."""

    def __init__(self, path: str | None):
        self._path, self._rows = path, []
        if not path or not Path(path).is_file():
            return
        from edgeattn.apps import record
        results = [found for found in record.read(path) if found["kind"] == "bench"]
        record.tell_versions(results, path, "what they say is measured again")
        self._rows = [found for found in results if found["edgeattn"] == record.version()]

    def rows(self, args: argparse.Namespace, repetitions: int) -> dict[str, Row]:
        """{test: row} of one setting of the same export on this machine, by the same code."""
        if not self._rows:
            return {}
        from edgeattn.apps import models, record
        from edgeattn.cache.session import fingerprint
        from edgeattn.runtime import read_config
        export, host = fingerprint(read_config(models.exported(args.model, args.precision)))[:16], record.host()
        return {found["test"]: Row(**{one.name: found[one.name] for one in fields(Row)}) for found in self._rows
                if (found["export"], found["setting"], found["repetitions"]) == (export, axes.setting(args), repetitions)
                and found["machine"].endswith(host)}

    def add(self, row: Row) -> None:
        if self._path:
            from edgeattn.apps import record
            record.append(self._path, asdict(row))
