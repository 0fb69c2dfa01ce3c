"""edgeattn calibrate: measure what methods need to know of a model, on the model itself, and write it into its folder."""
import argparse

from edgeattn.apps import options

HELP = "measure which KV heads look things up and what some sparse methods need; writes calibration.safetensors into the model's folder"
PARTS = ("heads", "components", "thresholds", "prefill")
USUAL = PARTS[:3]  # the fourth takes longer than these together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", metavar="FOLDER", help="an exported folder, or a Hugging Face checkpoint (exported once, to the "
                        "user's cache); the bundled nano by default")
    parser.add_argument("--precision", choices=options.PRECISIONS,
                        help="for a checkpoint: what to export it to (int4; ternary weights stay so)")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there instead; only the model's folder is looked in later")
    parser.add_argument("--lengths", type=options.numbers(1), metavar="N,N,...", help="tokens of the prompts (512,1024,2048, as far as the "
                        "context reaches; for prefill 1024,2048,4096)")
    parser.add_argument("--prompts", type=options.whole(1), default=3, metavar="N", help="prompts of each length, with 4 passkeys each (3; "
                        "for prefill one)")
    parser.add_argument("--parts", type=_parts, default=USUAL, metavar="PART,...", help="what to measure: heads (which look things up: for "
                        "--sparse-attention and --kv-heads), components (of keys: loki), thresholds (of scores: top_theta), and, where it "
                        "is asked for, prefill (what sale, minference, sparge_attn and moa need: --sparse-prefill); all but prefill")
    parser.add_argument("-s", "--seed", type=options.whole(0), default=0, metavar="N", help="of the prompts' text (0)")
    options.add_device(parser)
    parser.add_argument("-t", "--threads", type=options.whole(1), metavar="N", help="threads (one for each core)")


def _parts(text):
    found = text.split(",")
    if set(found) - set(PARTS):
        raise argparse.ArgumentTypeError(f"wanted some of {','.join(PARTS)}, got {text!r}")
    return found


def main(args: argparse.Namespace) -> int:
    from edgeattn.apps import models
    from edgeattn.apps.progress import Progress
    if args.device == "cuda":
        raise ValueError("what calibrate measures it measures on the CPU: leave out --device cuda; the result serves both")
    folder = models.exported(args.model, args.precision)
    from edgeattn import calibration
    from edgeattn.cache.options import CacheOptions
    from edgeattn.prefill_scheduler import PrefillOptions
    from edgeattn.runtime import Model, read_config
    from edgeattn.scheduler import SparseOptions
    from edgeattn.tokenizer import Tokenizer
    tokenizer, about = Tokenizer(folder), read_config(folder)["model"]
    if about["window"]:
        raise ValueError(f"{folder}: this model has sliding windows, which head classes do not go with")
    usual, prefill = lengths(args, folder, about["ctx_size"])
    path, said = args.output or folder / calibration.FILE, []
    kinds = [(measure, usual, args.prompts)] * bool(usual) + [(measure_prefill, prefill, 1)] * bool(prefill)
    prompts = [[calibration.passkeys(tokenizer, n, args.seed + i) for n in some for i in range(count)] for _, some, count in kinds]
    with Progress("compiling kernels for this CPU (once)") as progress:
        model = Model.load(folder, cache=CacheOptions("f16", "f16"), ctx_size=max(usual + prefill) + 64 * calibration.BRANCHES,
                           threads=args.threads, sparse=SparseOptions("off"), prefill=PrefillOptions("off"), progress=progress)
    for (kind, some, _), texts in zip(kinds, prompts):
        kind(args, model, texts, path, {"lengths": some, "prompts": len(texts), "seed": args.seed})
        said.append(f"{len(texts)} prompts of {', '.join(f'{n:,}' for n in some)} tokens")
    print(f"{', '.join(args.parts)}: {'; for prefill '.join(said)}, seed {args.seed}. Written: {path}")
    return 0


def lengths(args: argparse.Namespace, folder, ctx_size: int) -> tuple[list[int], list[int]]:
    """Of the prompts for the usual parts, and for prefill; none where no such part is wanted. ValueError: too long for the context."""
    from edgeattn import calibrate_prefill, calibration
    most = ctx_size - 128  # a short context leaves room for fewer branches
    usual, prefill = ([n for n in known if n <= most] for known in (calibration.LENGTHS, calibrate_prefill.LENGTHS))
    usual, prefill = args.lengths or usual, args.lengths or prefill or usual
    if not usual or max(usual + prefill) > most:
        raise ValueError(f"{folder}: its context of {ctx_size} tokens has room for prompts of {max(0, most)}; "
                         f"{max(usual, default=calibration.LENGTHS[0])} are wanted")
    return usual if set(args.parts) & set(USUAL) else [], prefill if "prefill" in args.parts else []


def measure_prefill(args: argparse.Namespace, model, prompts: list, path, about: dict) -> None:
    from edgeattn import calibration
    from edgeattn.apps.progress import Progress
    from edgeattn.calibrate_prefill import fit_prefill
    with Progress("trying plans", patience=0) as progress:
        found = fit_prefill(model, [ids for ids, _ in prompts], lambda done, total: progress("", done, total))
    calibration.save(path, model.config, found, {name: about | {"chunk": model.ubatch} for name in found})


def measure(args: argparse.Namespace, model, prompts: list, path, about: dict) -> None:
    """The usual parts, each into the file as soon as it is there."""
    from edgeattn import calibration
    from edgeattn.apps.progress import Progress
    from edgeattn.calibrate_thresholds import fit_thresholds
    from edgeattn.principal_components import NAME as COMPONENTS, measure_components
    if "components" in args.parts:
        with Progress("reading keys", patience=0) as progress:
            components = measure_components(model, [ids for ids, _ in prompts], progress=lambda done, total: progress("", done, total))
        calibration.save(path, model.config, {COMPONENTS: components}, {COMPONENTS: about})
    if "thresholds" in args.parts:
        with Progress("reading scores", patience=0) as progress:
            progress("", 0, 1)
            thresholds = fit_thresholds(model, [ids for ids, _ in prompts])
        calibration.save(path, model.config, {"thresholds": thresholds}, {"thresholds": about})
    if "heads" in args.parts:
        with Progress("asking for passkeys", patience=0) as progress:
            scores, base = calibration.score_heads(model, prompts, progress=lambda done, total: progress("", done, total))
        calibration.save(path, model.config, {"head_scores": scores}, {"head_scores": about | {
            "method": "zeroth-order passkey", "questions": sum(len(asks) for _, asks in prompts), "recent": calibration.RECENT,
            "loss": base}})
        print(table(scores, base) + "\n")


def table(scores, base: float) -> str:
    """The scores, layer by layer, with a mark at the half of the heads that retrieves most."""
    from edgeattn.calibration import best
    keep = best(scores, 0.5)
    lines = [f"a passkey's loss is {base:.3f} nats a token, and rises by this much when a KV head sees no more than the text's beginning "
             "and end", "layer " + " ".join(f"{'head ' + str(h):>9} " for h in range(scores.shape[1]))]
    lines += [f"{layer:5} " + " ".join(f"{s:+9.4f}{'*' if k else ' '}" for s, k in zip(row, kept))
              for layer, (row, kept) in enumerate(zip(scores, keep))]
    return "\n".join([*(line.rstrip() for line in lines), f"* the {keep.sum()} of {keep.size} that keep everything at "
                      "--kv-retrieval-heads 0.5"])
