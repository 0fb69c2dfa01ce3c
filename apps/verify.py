"""edgeattn verify: whether this device computes right, and an exported folder is what it was when it was made."""
import argparse
import json
import math
import time

from edgeattn.apps import options

HELP = "check that this device computes right: every operator, an export, and each cache type and policy; exit code 1 where it does not"
PARTS = ("operators", "export", "settings")
WIDTHS = {"operators": 22, "export": 0, "settings": 46}  # of names
MOST = 0.1  # root-mean-square error against stock onnxruntime, in standard deviations of the logits: both round activations to int8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help="an exported folder; the bundled nano by default")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="the Hugging Face checkpoint it was made from (nano: the bundled one); "
                        "without it, the same file in stock onnxruntime is the measure")
    parser.add_argument("--full", action="store_true", help="every method of sparse attention, storage and eviction, not just the defaults")
    parser.add_argument("--only", type=_parts, default=PARTS, metavar="PART[,PART]", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="format of the report (text)")
    options.add_device(parser)


def _parts(text):
    parts = tuple(text.split(","))
    if set(parts) - set(PARTS):
        raise argparse.ArgumentTypeError(f"wanted some of {','.join(PARTS)}, got {text!r}")
    return parts


def main(args: argparse.Namespace) -> int:
    from pathlib import Path
    from edgeattn.apps import models
    from edgeattn.apps.progress import Progress
    from edgeattn.runtime import read_config
    folder = Path(args.folder) if args.folder else models.exported(None)
    read_config(folder)  # what is no export at all is a mistake, not a difference
    checkpoint = models.find(args.checkpoint) if args.checkpoint else None
    from edgeattn.devices import make_backend
    device = make_backend(args.device).device  # a GPU that is not there is a mistake too
    start, found, title = time.perf_counter(), [], "checking; kernels are compiled once"
    for part in PARTS:
        if part in args.only:
            with Progress(f"{title}: {part}") as progress:
                new = _checks(part, folder, checkpoint, device, args.full, progress)
            found += new
            if args.output == "text":
                print("\n".join(_lines(part, folder, device, new)), flush=True)
    passed = all(check.passed is not False for check in found)
    if args.output == "json":
        print(json.dumps({"folder": str(folder), "device": _name(device), "passed": passed, "checks": [_plain(check) for check in found]}))
    else:
        print(_verdict(found, time.perf_counter() - start))
    return 0 if passed else 1


def _checks(part, folder, checkpoint, device, every, progress):
    if part == "operators":
        from edgeattn.verification.operators import check_operators
        return check_operators(device, progress)
    if part == "export":
        progress(folder.name, 0, 1)
        return [_export(folder, checkpoint, device)]
    from edgeattn.verification.settings import check_settings
    return check_settings(folder, device, every, progress)


def _export(folder, checkpoint, device):
    """The files and the logits of an export as a Check."""
    from edgeattn.apps.cli import one_line
    from edgeattn.apps.export import verify_line
    from edgeattn.exporters.check import verify
    from edgeattn.verification import Check
    try:
        report = verify(folder, checkpoint, device)
    except ValueError as error:
        return Check("export", folder.name, False, {}, one_line(error))
    figures = {name: number for name, number in report.items() if isinstance(number, float)}
    right = checkpoint is not None or report["rms_error"] <= MOST  # a checkpoint's limits are the exporter's own
    return Check("export", folder.name, right, figures, verify_line(report))


def _plain(check):
    """As JSON has it, which knows no infinity."""
    return vars(check) | {"figures": {name: x if math.isfinite(x) else None for name, x in check.figures.items()}}


def _name(device):
    if device != "cpu":
        return device
    from edgeattn.kernels_cpu import LEVEL
    return f"cpu ({LEVEL})"


def _lines(part, folder, device, checks):
    """The checks of a part for people, a line each."""
    if part == "operators":
        yield f"operators against their NumPy references, on {_name(device)}"
    elif part == "settings":
        yield f"{folder.name} with each setting against a dense 16-bit cache: top-1 agreement, KL in nats"
    for check in checks:
        mark = {True: "ok", False: "FAILED", None: "-"}[check.passed]
        yield f"  {mark:<7}{check.name:<{WIDTHS[part]}} {_figures(check)}".rstrip()


def _figures(check):
    f = check.figures
    if check.what == "operator":
        text = f"{f['cases']:>3} cases, largest error {f['worst']:.0%} of what is allowed" if check.passed is not None else ""
    elif check.what == "setting" and f:
        text = f"{f['top1']:>6.1%} (at least {f['top1_limit']:.0%})  {f['kl']:.4f} (at most {f['kl_limit']:.4f})"
    else:
        text = ""
    return "  ".join(filter(None, (text, check.note)))


def _verdict(checks, seconds):
    failed, left_out = (sum(check.passed is state for check in checks) for state in (False, None))
    what = f"{failed} of {len(checks)} checks FAILED: do not trust what this device computes" if failed else \
        f"all {len(checks) - left_out} checks passed"
    return f"{what}{f', {left_out} left out' if left_out else ''} ({seconds:.0f} s)"
