"""edgeattn verify: an exported folder against the checkpoint it was made from."""
import argparse
from pathlib import Path

HELP = "compare an exported folder with its checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", help="an exported folder")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="the Hugging Face checkpoint (by default only the files are checked)")


def main(args: argparse.Namespace) -> int:
    raise ValueError("not yet")
