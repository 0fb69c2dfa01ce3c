"""The edgeattn command: one verb a file, each with HELP, add_arguments(parser) and main(args) -> exit code.

Nothing heavy is imported before a verb runs, so that --help is instant.
"""
import argparse
import os
import sys

import edgeattn
from edgeattn.apps import bench, calibrate, chat, doctor, estimate, eval, export, generate, inspect, serve, session, verify

VERBS = {"chat": chat, "serve": serve, "generate": generate, "session": session, "export": export, "calibrate": calibrate,
         "estimate": estimate, "bench": bench, "eval": eval, "verify": verify, "inspect": inspect, "doctor": doctor}
EXAMPLES = """examples:
  edgeattn chat                                     talk to the bundled model
  edgeattn chat -m ~/models/Llama-3.2-1B-Instruct   exports it first, once
  edgeattn export ~/models/Llama-3.2-1B-Instruct -o llama-int4 --precision int4
  edgeattn bench -m llama-int4 -p 512 -n 128 -d 0,4096"""


class Parser(argparse.ArgumentParser):
    """Mistakes in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser("edgeattn", description="Run language models on this machine: quantised, sparse, measured.", epilog=EXAMPLES,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"edgeattn {edgeattn.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True, parser_class=Parser)
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP[0].upper() + module.HELP[1:] + ".", allow_abbrev=False)
        module.add_arguments(verb)
        verb.set_defaults(run=module.main)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb. 0 done, 1 a check failed or this machine did, 2 a user's mistake, 130 interrupted, 141 nobody reads our output.
    Errors are told in one line."""
    args = make_parser().parse_args(argv)
    _tolerate_encodings()
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it flushes at exit
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if args.debug:
            raise
        from edgeattn.cache.pages import CacheFull
        print(f"edgeattn {args.verb}: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, OSError, CacheFull)) else 1


def one_line(error: Exception) -> str:
    """What went wrong, without line breaks."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _tolerate_encodings():
    """Text that a terminal or pipe cannot carry becomes a question mark, and a closed stream an empty one: no crash."""
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout, sys.stderr = sys.stdout or open(os.devnull, "w"), sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
