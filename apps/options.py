"""Command-line flags that several verbs share, named as in llama.cpp."""
import argparse

PRECISIONS = ("int4", "int8", "fp16", "fp32")


def whole(minimum: int):
    """An argparse type: a whole number of at least `minimum`."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        return value
    return parse


def numbers(minimum: int):
    """An argparse type: whole numbers with commas between them."""
    one = whole(minimum)
    return lambda text: [one(part) for part in text.split(",")]


def unescape(text: str) -> str:
    r"""\n, \t and \\ as a shell user types them."""
    marks = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
    parts, i = [], 0
    while i < len(text):
        step = 2 if text[i:i + 2] in marks else 1
        parts.append(marks.get(text[i:i + step], text[i]))
        i += step
    return "".join(parts)


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", metavar="FOLDER", help="an exported folder, or a Hugging Face checkpoint (exported once, to the "
                       "user's cache); the bundled nano by default")
    group.add_argument("--precision", choices=PRECISIONS, default="int4", help="for a checkpoint: what to export it to (int4)")
    group.add_argument("-c", "--ctx-size", type=whole(0), metavar="N", help="tokens that the cache holds (0 or none: all the model allows)")
    group.add_argument("-t", "--threads", type=whole(1), metavar="N", help="threads (one for each core)")
    group.add_argument("-ub", "--ubatch-size", type=whole(1), metavar="N", help="prompt tokens computed at once (512)")
    group.add_argument("--kv-type", choices=("f16", "f32"), help="what the cache stores (f16; f32 for fp32 exports)")
    for flag, name in (("-ctk", "--cache-type-k"), ("-ctv", "--cache-type-v")):
        group.add_argument(flag, name, choices=("f16", "f32"), help=argparse.SUPPRESS)


def kv_type(args: argparse.Namespace) -> str | None:
    """The one storage type asked for by --kv-type, -ctk and -ctv."""
    asked = {kind for kind in (args.kv_type, args.cache_type_k, args.cache_type_v) if kind}
    if len(asked) > 1:
        raise ValueError("keys and values are stored in one type: give --kv-type f16 or --kv-type f32")
    return next(iter(asked), None)


def add_sampling(parser: argparse.ArgumentParser, predict: int) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("-n", "--predict", type=whole(-1), default=predict, metavar="N",
                       help=f"most tokens to generate; -1: until the model ends or the context is full ({predict})")
    group.add_argument("--temp", type=float, default=0.8, metavar="X", help="temperature; 0 always takes the likeliest token (0.8)")
    group.add_argument("--top-k", type=int, default=40, metavar="N", help="keep the N likeliest tokens; 0 keeps all (40)")
    group.add_argument("--top-p", type=float, default=0.95, metavar="X", help="keep the likeliest tokens that sum to X (0.95)")
    group.add_argument("--min-p", type=float, default=0.05, metavar="X", help="keep tokens at least X times as likely as the best (0.05)")
    group.add_argument("--repeat-penalty", type=float, default=1.0, metavar="X", help="make seen tokens less likely; 1 is off (1)")
    group.add_argument("--repeat-last-n", type=int, default=64, metavar="N", help="tokens that the penalty looks back on; -1 all (64)")
    group.add_argument("-s", "--seed", type=int, default=-1, metavar="N", help="the same seed gives the same text; -1 is random (-1)")
    group.add_argument("-r", "--stop", "--reverse-prompt", action="append", default=[], type=unescape, metavar="TEXT",
                       help=r"end where this text appears; may be repeated, \n is a new line")


def sampler_options(args: argparse.Namespace):
    """The flags of `add_sampling` as SamplerOptions."""
    from edgeattn.generation import SamplerOptions
    return SamplerOptions(args.temp, args.top_k, args.top_p, args.min_p, args.repeat_penalty, args.repeat_last_n, args.seed)


def add_prompt(parser: argparse.ArgumentParser, what: str) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("-p", "--prompt", metavar="TEXT", help=what)
    group.add_argument("-f", "--file", metavar="FILE", help=f"{what}, from a file (- is stdin)")


def read_prompt(args: argparse.Namespace) -> str | None:
    """The text of -p or -f; None when neither was given."""
    import sys
    if args.file is None:
        return args.prompt
    if args.file == "-":
        return sys.stdin.read().removesuffix("\n")
    with open(args.file, encoding="utf-8", errors="replace") as file:
        return file.read().removesuffix("\n")
