"""edgeattn verify: an exported folder against its recorded hashes, its checkpoint, or stock onnxruntime."""
import argparse
import sys
from pathlib import Path

from edgeattn.apps import options

HELP = "check an exported folder: its files, and its logits against the checkpoint or stock onnxruntime; exit code 1 when they differ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="an exported folder")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="the Hugging Face checkpoint it was made from (nano: the bundled one); "
                        "without it, the same file in stock onnxruntime is the measure")
    options.add_device(parser)


def main(args: argparse.Namespace) -> int:
    from edgeattn.apps import models
    from edgeattn.apps.cli import one_line
    from edgeattn.apps.export import verify_line
    from edgeattn.runtime import read_config
    folder = Path(args.folder)
    read_config(folder)  # what is no export at all is a mistake, not a difference
    checkpoint = models.find(args.checkpoint) if args.checkpoint else None
    from edgeattn.devices import make_backend
    from edgeattn.exporters.check import verify
    device = make_backend(args.device).device  # a GPU that is not there is a mistake too
    try:
        report = verify(folder, checkpoint, device)
    except ValueError as error:
        print(f"edgeattn verify: {one_line(error)}", file=sys.stderr)
        return 1
    print(verify_line(report))
    return 0
