"""Command-line flags that several verbs share, named as in llama.cpp."""
import argparse
import re

TERNARY_LAYOUTS = ("panels", "sparse", "dense")
PRECISIONS = ("int4", "int8", "fp16", "fp32", "ternary")
KV_TYPES = ("f32", "f16", "int8", "int4", "int3", "int2")


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
    group.add_argument("-m", "--model", metavar="FOLDER", help="an exported folder, or a Hugging Face checkpoint or GGUF file (exported "
                       "once, to the user's cache); the bundled nano by default")
    group.add_argument("--precision", choices=PRECISIONS, help="for a checkpoint: what to export it to (int4; ternary weights stay so)")
    group.add_argument("-c", "--ctx-size", type=whole(0), metavar="N", help="tokens that the cache holds (0 or none: all the model allows)")
    group.add_argument("-t", "--threads", type=whole(1), metavar="N", help="threads (one for each core)")
    group.add_argument("-ub", "--ubatch-size", type=whole(1), metavar="N", help="prompt tokens computed at once (512)")
    add_cache(parser)
    add_sparse(parser)


def add_cache(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("KV cache")
    for flag, name, what in (("-ctk", "--cache-type-k", "keys"), ("-ctv", "--cache-type-v", "values")):
        group.add_argument(flag, name, choices=KV_TYPES, metavar="TYPE",
                           help=f"how {what} are stored: {', '.join(KV_TYPES)} (f16; with --kv-budget what fits)")
    group.add_argument("--kv-bits", choices=(16, 8, 4, 3, 2), type=int, help="-ctk and -ctv in one: bits of keys and values")
    group.add_argument("--kv-storage", metavar="METHOD", default="kivi", help="how codes are made: kivi, hadamard, zipcache, akvq, bitnet, "
                       "or delta: keys as differences (kivi)")
    group.add_argument("--kv-budget", type=size, metavar="N", help="most memory of the cache, in bytes or as 512M: a hard limit")
    group.add_argument("--kv-eviction", metavar="METHOD", default="auto", help="which tokens go when the budget is full: key_diff (the "
                       "default), streaming_llm, snapkv, h2o ... (edgeattn inspect --matrix lists them); none: stop there")
    group.add_argument("--kv-layer-budget", metavar="RULE", default="uniform", help="how layers share what eviction leaves: uniform (the "
                       "default), zipvl or cascade")
    group.add_argument("--kv-heads", metavar="METHOD", default="none", help="what KV heads keep that look nothing up: duo or razor (the "
                       "first page and recent tokens); none: everything (the default). Needs edgeattn calibrate once")
    group.add_argument("--kv-retrieval-heads", type=share, default=0.5, metavar="SHARE", help="with --kv-heads: part of the KV heads that "
                       "keep everything, those that retrieve most (0.5)")
    group.add_argument("--kv-sink-tokens", type=whole(0), default=4, metavar="N", help="first tokens that are never evicted (4)")
    group.add_argument("--kv-window", type=whole(32), default=64, metavar="N", help="newest tokens that are neither evicted nor quantised, "
                       "a multiple of 32 (64)")
    group.add_argument("--delta-threshold", type=float, default=1.3, metavar="X", help="with --kv-storage delta: a key's channels are "
                       "stored where they changed by more than X times the page's mean size (1.3)")
    group.add_argument("--delta-refresh", type=share, default=0.3, metavar="SHARE", help="with --kv-storage delta: pages of which less can "
                       "be left out are kept whole (0.3)")
    group.add_argument("--kv-progressive", type=float, default=0.0, metavar="X", help="with -ctk int8: read four bits of keys where the "
                       "largest attention weight of the step before was at least X (0: off)")


def add_sparse(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sparse attention")
    group.add_argument("--sparse-attention", metavar="METHOD", default="auto", help="what a decode step reads of a long context: off "
                       "(everything), auto (the default), quest, sink_window ... (edgeattn inspect --matrix lists them)")
    group.add_argument("--sparse-budget", type=whole(1), metavar="N", help="tokens that a step reads of each KV head (auto: 2048 or an "
                       "eighth of the context, whichever is more)")
    group.add_argument("--sparse-prefill", metavar="METHOD", default="auto", help="what a prompt reads of a long context before it: off "
                       "(everything), auto (the default), xattention, sale ... (the same list)")
    group.add_argument("--prefill-correction", choices=("none", "tail", "delta"), help="what makes good what a prompt does not read: tail, "
                       "pages as their mean key and value; delta, what reading everything would change of each 64th token (the method's "
                       "own)")
    group.add_argument("--sparse-min-len", type=whole(0), metavar="N", help="tokens in the context from which both are sparse (what was "
                       "measured on this machine; prompts with other methods than auto: 1024)")
    group.add_argument("--explain", action="store_true", help="say at the end what sparse attention decided, and why")


def sparse_options(args: argparse.Namespace):
    """The flags of `add_sparse` as SparseOptions; ValueError for a mistake."""
    from edgeattn.scheduler import SparseOptions
    if args.sparse_attention == "off" and args.sparse_budget:
        raise ValueError("--sparse-budget needs --sparse-attention")
    if args.sparse_attention == args.sparse_prefill == "off" and args.sparse_min_len is not None:
        raise ValueError("--sparse-min-len needs --sparse-attention or --sparse-prefill")
    options = {} if args.sparse_budget is None else {"budget": args.sparse_budget, "fraction": 0.0}
    return SparseOptions(args.sparse_attention, options, args.sparse_min_len)


def prefill_options(args: argparse.Namespace):
    from edgeattn.prefill_scheduler import PrefillOptions
    if args.sparse_prefill == "off" and args.prefill_correction:
        raise ValueError("--prefill-correction needs --sparse-prefill")
    return PrefillOptions(args.sparse_prefill, {}, args.sparse_min_len, args.prefill_correction)


def size(text: str) -> int:
    """An argparse type: bytes, or a number with K, M or G behind it (powers of 1024)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"must be bytes, or a number with K, M or G such as 512M, got {text!r}")
    return int(float(found[1]) * 1024 ** " KMG".index(found[2].upper() or " "))


def share(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def cache_options(args: argparse.Namespace):
    """The flags of `add_cache` as CacheOptions; ValueError for a mistake."""
    from edgeattn.cache.options import CacheOptions
    if args.kv_eviction == "adore" and getattr(args, "session", None):
        raise ValueError("--session cannot save a cache with released pages: leave it out, or choose another --kv-eviction than adore")
    both = {None: None, 16: "f16"}.get(args.kv_bits, f"int{args.kv_bits}")
    if both and {args.cache_type_k, args.cache_type_v} - {None, both}:
        raise ValueError(f"--kv-bits {args.kv_bits} and -ctk or -ctv contradict each other: give one of them")
    return CacheOptions(k_type=args.cache_type_k or both or "auto", v_type=args.cache_type_v or both or "auto", storage=args.kv_storage,
                        budget=args.kv_budget, eviction=args.kv_eviction, sink_tokens=args.kv_sink_tokens, window=args.kv_window,
                        heads=args.kv_heads, retrieval=args.kv_retrieval_heads, layer_budget=args.kv_layer_budget,
                        progressive=args.kv_progressive, delta_threshold=args.delta_threshold, delta_refresh=args.delta_refresh)


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


def add_shift(parser: argparse.ArgumentParser, first: str) -> None:
    group = parser.add_argument_group("full context")
    group.add_argument("--context-shift", action="store_true", help="go on when the context is full: forget the older half of it, and "
                       "compute the rest again")
    group.add_argument("--keep", type=whole(0), metavar="N", help=f"first tokens that --context-shift never forgets, half of the context "
                       f"at most ({first})")


def context_shift(args: argparse.Namespace):
    """The flags of `add_shift` as a ContextShift; None without --context-shift. ValueError: --keep alone."""
    from edgeattn.context_shift import ContextShift
    if args.keep is not None and not args.context_shift:
        raise ValueError("--keep says what --context-shift keeps: give that too")
    return ContextShift(args.keep) if args.context_shift else None


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
