"""edgeattn report: measures a model on this machine and writes one page about it, which needs no network."""
import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from edgeattn.apps import options

HELP = "measure speed, memory and quality, and write one self-contained HTML page about them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="FOLDER", help="as everywhere: an export, a checkpoint or a GGUF file; nano by default")
    parser.add_argument("-o", "--output", metavar="FILE.html", default="report.html", help="the page (report.html); results are kept "
                        "beside it as FILE.jsonl, and what is there is not measured again")
    parser.add_argument("-c", "--ctx-size", type=options.whole(64), default=8192, metavar="N", help="tokens of the deepest context that is "
                        "measured, if the model has as many (8192)")
    options.add_device(parser)
    parser.add_argument("--from", dest="sources", metavar="FILE.jsonl", action="append", default=[], help="measure nothing: a page of what "
                        "`edgeattn bench` and `edgeattn eval` have kept with --out; may be repeated")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown and write no page")
    parser.add_argument("--quick", action="store_true", help="few samples, to see that everything works; results are kept in "
                        "FILE.quick.jsonl")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would measure")


def main(args: argparse.Namespace) -> int:
    from edgeattn.apps import record
    for path in args.sources:
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file; make it with `edgeattn bench --out {path}`")
    page = Path(args.output)
    if not args.markdown and not page.resolve().parent.is_dir():
        raise ValueError(f"{page}: no such folder")
    if not args.markdown and not args.dry_run:
        need_plots()
    if args.sources:
        results, failed = [result for path in args.sources for result in record.read(path)], []
    else:
        kept = page.with_suffix(".quick.jsonl" if args.quick else ".jsonl")
        results, failed = _measure(args, kept)
        if args.dry_run:
            return 0
    results = latest(results)
    if args.sources:
        versions = sorted({result["edgeattn"] for result in results})
        if len(versions) > 1:
            print(f"results of several versions of edgeattn stand side by side: {', '.join(versions)}", file=sys.stderr)
    if not results:
        raise ValueError("no results to report")
    if args.markdown:
        from edgeattn.apps.report_tables import markdown
        print(markdown(results))
        return 1 if failed else 0
    from edgeattn.apps.report_page import render
    write(page, render(results))
    print(page)
    return 1 if failed else 0


def latest(results: list[dict]) -> list[dict]:
    """Of results of the same machine, model, setting and test one, in the order of the first: of the version of edgeattn that came last the
    one over most samples, the last of those. A machine is its processor's name, for a new kernel makes none; where there are several,
    models are named with theirs."""
    machines = [result["machine"].partition(",")[0] for result in results]
    if len(set(machines)) > 1:
        results = [result | {"model": f"{result['model']} on {machine}"} for result, machine in zip(results, machines)]
    found = {}
    for result in results:
        place = tuple(result.get(name) for name in ("kind", "model", "setting", "test", "task", "depth"))
        before = found.get(place, result)
        if result["edgeattn"] != before["edgeattn"] or _samples(result) >= _samples(before):
            found[place] = result
    return list(found.values())


def _samples(result):
    return result["repetitions"] if result["kind"] == "bench" else result["samples"]


def need_plots() -> None:
    """ValueError: what draws is not installed."""
    from importlib.util import find_spec
    if find_spec("matplotlib") is None:
        raise ValueError(f"the page's plots need matplotlib: {sys.executable} -m pip install matplotlib, or edgeattn[report]")


def write(path: Path, text: str) -> None:
    """The whole file or none of it."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _flags(args):
    """What all commands are told."""
    given = {"-m": args.model, "--device": None if args.device == "cpu" else args.device}
    return [part for flag, value in given.items() if value for part in (flag, value)]


def _measure(args, kept):
    """Run what is missing. -> (the results of this model that `kept` then holds, titles of what failed)"""
    from edgeattn.apps import models, record
    from edgeattn.apps.report_plan import steps
    from edgeattn.runtime import read_config
    config = read_config(models.exported(args.model))
    plan, failed = steps(_flags(args), config, args.ctx_size, args.quick), []
    for i, step in enumerate(plan, 1):
        command = [*step.arguments, "--out", str(kept)]
        if args.dry_run:
            print(shlex.join(["edgeattn", *command]))
            continue
        print(f"{i} of {len(plan)}: {step.title} (edgeattn {shlex.join(command)})", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", "edgeattn.apps.cli", *command], stdout=subprocess.DEVNULL)
        if done.returncode in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if done.returncode:
            failed.append(step.title)
    if failed:
        print(f"not all could be measured: {', '.join(failed)}; the next call tries again", file=sys.stderr)
    name = record.model_name(config)
    results = [result for result in (record.read(kept) if kept.is_file() else []) if result["model"] == name]
    record.tell_versions(results, str(kept), "they are not shown")
    return [result for result in results if result["edgeattn"] == record.version()], failed
