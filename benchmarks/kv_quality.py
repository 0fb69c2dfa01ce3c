"""What a setting of the KV cache or of sparse attention costs, against the same model with another: the plain 16-bit cache, read whole.

    python benchmarks/kv_quality.py FOLDER --text book.txt --setting int4:k_type=int4,v_type=int4 --out kv.jsonl

A setting is a name and fields of CacheOptions; --settings takes a file, {"int4": {"k_type": "int4", "v_type": "int4"}, ...}. Its field
`sparse` is a method of --sparse-attention, `sparse_NAME` that method's option NAME; sparse settings are sparse from the first token on.
`prefill` and `prefill_NAME` are the same for --sparse-prefill, and `prefill_correction` is --prefill-correction: chunks are sparse then
from their first token on. Of `sparse` only decode steps are: --decode has the last tokens of each window computed one at a time, and only
those counted.
Perplexity, KL (base against setting, natural log) and top-1 agreement of the next token are over windows of the text. Look-ups plant
one or eight facts in the text and ask for each once all of it is in the cache, so that nothing can be kept with the question
in view. Chunks are small (--ubatch): a chunk sees its own tokens before they are stored, and only earlier ones as the cache gives
them back. Every setting gets the base's windows and questions. --out keeps results, one line a setting, and settings that
it holds are not run again: begin a new file after a change to the cache's code.
"""
import argparse
import ast
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edgeattn.apps.eval_table import change
from edgeattn.apps.table import markdown
from edgeattn.cache.options import CacheOptions
from edgeattn.evaluation.asking import ANSWER_TOKENS, SLACK, widen
from edgeattn.evaluation.kld import Divergence
from edgeattn.evaluation.lookups import GROUP, MANY, look_up
from edgeattn.evaluation.statistics import difference
from edgeattn.log_softmax import log_softmax
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions
from edgeattn.tokenizer import Tokenizer

BASE = ("f16", {"k_type": "f16", "v_type": "f16"})  # in words, for an export may have another default
MOST_ALONE = 80  # each takes a prefill of most of a haystack, where eight facts share one
TOGETHER = 8  # chunks of a window in one call: the end of each call reads everything


def load(folder, fields, args):
    """The model with the cache of a setting."""
    tokens = max(args.window + args.generate, max(args.depths) + (GROUP * (2 * ANSWER_TOKENS) if args.turns else ANSWER_TOKENS))
    cache = {name: value for name, value in fields.items() if not name.startswith(("sparse", "prefill"))}
    own = {kind: {name.removeprefix(f"{kind}_"): value for name, value in fields.items() if name.startswith(f"{kind}_")}
           for kind in ("sparse", "prefill")}
    correction = own["prefill"].pop("correction", None)
    sparse = SparseOptions(fields.get("sparse", "off"), own["sparse"], 0)
    prefill = PrefillOptions(fields.get("prefill", "off"), own["prefill"], 0, correction)
    model = Model.load(folder, cache=CacheOptions(**cache), ctx_size=tokens + SLACK, ubatch=args.ubatch, sparse=sparse, prefill=prefill)
    if model.cache.options.budget:
        widen(model)
    if tokens > model.ctx_size:
        raise SystemExit(f"{folder}: {tokens} tokens are needed, its context is {model.ctx_size}; give a smaller --window or --depths")
    return model


def compare_text(model, base, ids, window, windows, decode, advance) -> dict:
    """Perplexities, mean KL(base || model) and top-1 agreement; both read a chunk at a time, so that few logits are held. decode: only
    the last so many tokens of a window count, and come one by one; 0: all of them, in chunks."""
    found, chunk, first = Divergence(), 1 if decode else TOGETHER * model.ubatch, window - decode if decode else 0
    for i in range(windows):
        part = ids[i * window:(i + 1) * window]
        found.begin()
        # A list, for the base is compared with itself too.
        pair = [(m, m.new_sequence()) for m in ((base, model) if base is not model else (base,))]
        try:
            for m, sequence in pair if first else ():
                m.forward([(sequence, part[:first])], "none")
            for start in range(first, window, chunk):
                rows = [log_softmax(m.forward([(sequence, part[start:start + chunk])], "all")) for m, sequence in pair]
                found.add(rows[0], rows[-1], part, start)
        finally:
            for m, sequence in pair:
                m.free(sequence)
        advance(1)
    return {"base_perplexity": found.base_perplexity, "perplexity": found.perplexity, "kl": found.mean, "top1": found.same_top}


def measure(name, fields, base, args, tokenizer, ids) -> dict:
    """A line of the results. base: the base's model, or None for the base itself."""
    began, model = time.perf_counter(), load(args.folder, fields, args)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        task = progress.add_task(f"{name}: text", total=args.windows)
        text = compare_text(model, base or model, ids, args.window, args.windows, args.decode,
                            lambda n: progress.advance(task, n))
        seconds, lookups = {"text": time.perf_counter() - began}, {}
        for facts, depth in kinds(args):
            began, count = time.perf_counter(), counts(args)[facts]
            task = progress.add_task(f"{name}: {facts} in {depth:,}", total=count)
            lookups[cell(facts, depth)] = look_up(model, tokenizer, ids.tolist(), depth, facts, count, lambda n: progress.advance(task, n))
            seconds[cell(facts, depth)] = time.perf_counter() - began
    read = float(model.scheduler.figures()["read"]) if model.scheduler else 1.0
    read = model.prefill.figures()["read"] if model.prefill else read
    text |= generate(model, base or model, ids[:args.window], args.generate) if args.generate else {}
    seconds = {kind: round(value, 1) for kind, value in seconds.items()}
    return {"name": name, "fields": fields, **text, "read": read, "lookups": lookups, "seconds": seconds}


def generate(model, base, ids, count) -> dict:
    """Of `count` tokens generated greedily behind a window: the base's mean loss on them, and how many of their runs of four had been
    there before. A method that loses its way repeats itself, or writes what the base would not."""
    sequence, out = model.new_sequence(), []
    try:
        logits = model.forward([(sequence, ids)])
        for _ in range(count):
            out.append(int(logits[0].argmax()))
            logits = model.forward([(sequence, out[-1:])])
    finally:
        model.free(sequence)
    sequence = base.new_sequence()
    try:
        rows = [base.forward([(sequence, ids)])]
        rows += [base.forward([(sequence, out[i:i + base.ubatch])], "all") for i in range(0, count - 1, base.ubatch)]
        losses = -log_softmax(np.concatenate(rows)[:count])[np.arange(count), out]
    finally:
        base.free(sequence)
    runs = [tuple(out[i:i + 4]) for i in range(count - 3)]
    return {"generated_loss": float(losses.mean()), "repeated": 1 - len(set(runs)) / len(runs)}


def counts(args) -> dict[int, int]:
    """Questions of each kind of look-up (evaluation/lookups.py)."""
    return {kind: count for kind, count in ((1, args.one_fact), (GROUP, args.questions), (MANY, args.many), (0, args.turns)) if count}


def kinds(args) -> list[tuple[int, int]]:
    """(kind, tokens) of every look-up."""
    return [(kind, depth) for kind in counts(args) for depth in args.depths]


def cell(kind, depth):
    return f"{kind or 'turns'} in {depth}"


TITLES = {0: "in turn", 1: "one fact", GROUP: "eight facts", MANY: "32 facts"}


def compared(record, base, args) -> str:
    """The difference of all look-ups, and its interval."""
    return change("share", *difference(*(sum((r["lookups"][cell(*kind)]["right"] for kind in kinds(args)), []) for r in (record, base))))


def table(records, args) -> str:
    deepest = max(args.depths)
    head = ["method", "read", f"KV at {deepest:,}, MB (bytes a token)", "perplexity", "KL", "top-1",
            *(f"{TITLES[kind]}, {depth:,}" for kind, depth in kinds(args)), "look-ups, points",
            *(["generated: loss, repeated"] * bool(args.generate))]
    lines = [head]
    for record in records:
        kv = record["lookups"][cell(GROUP, deepest)]
        cells = [record["name"], f"{100 * record['read']:.1f} %", f"{kv['kv_bytes'] / 1e6:.2f} ({kv['kv_bytes'] / kv['tokens']:,.0f})"]
        if record is records[0]:
            cells += [f"{record['perplexity']:.3f}", "", ""]
        else:
            cells += [f"{100 * (record['perplexity'] / record['base_perplexity'] - 1):+.2f} %",
                      f"{record['kl']:.4f}" if record["kl"] >= 1e-3 else f"{record['kl']:.1e}", f"{100 * record['top1']:.2f} %"]
        for right in (record["lookups"][cell(*kind)]["right"] for kind in kinds(args)):
            cells.append(f"{np.sum(right)} of {np.size(right)}")
        cells.append("" if record is records[0] else compared(record, records[0], args))
        if args.generate:
            cells.append(f"{record['generated_loss']:.3f}, {100 * record['repeated']:.0f} %")
        lines.append(cells)
    return markdown(lines)


# ---- settings and stored results -----------------------------------------------------------------------------------
def setting(text: str) -> tuple[str, dict]:
    """name:field=value,... ; a value is a number, True, False or None where it reads as one, otherwise a string."""
    name, _, rest = text.partition(":")
    return name, dict(_field(part) for part in rest.split(",") if part)


def _field(part):
    name, equals, value = part.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"a field is name=value, got {part!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def conditions(args) -> dict:
    """What results must share to stand in one table; a file may hold those of several."""
    return {"model": _digest(args.folder / "edgeattn.json"), "text": _digest(args.text), "base": args.base[1], "window": args.window,
            "windows": args.windows, "decode": args.decode, "ubatch": args.ubatch, "questions": args.questions, "one_fact": args.one_fact,
            "many": args.many, "turns": args.turns,
            "generate": args.generate, "depths": args.depths}


def _digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def stored(args, run) -> list[dict]:
    if not (args.out and args.out.is_file()):
        return []
    records = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["run"] == run]


def run_settings(args, tokenizer, ids) -> list[dict]:
    """The base's record, then one a setting in the order given, from the file or measured now."""
    run = conditions(args)
    known, records, base = stored(args, run), [], None
    for name, fields in (args.base, *args.settings):
        record = next((r for r in known if r["fields"] == fields), None)
        if record is None:
            if records and base is None:
                base = load(args.folder, args.base[1], args)
            record = {"run": run, **measure(name, fields, base, args, tokenizer, ids)}
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        records.append(record | {"name": name})
    return records


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="text that the model has not seen, UTF-8")
    parser.add_argument("--setting", type=setting, action="append", default=[], metavar="NAME:FIELD=VALUE,...", help="may be repeated")
    parser.add_argument("--settings", type=Path, metavar="FILE.json", help="more settings, {name: {field: value}}")
    parser.add_argument("--base", type=setting, default=BASE, metavar="NAME:FIELD=VALUE,...", help="default: the plain 16-bit cache")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="results are added here; settings already there are not run again")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--decode", type=int, default=0, metavar="TOKENS",
                        help="of each window, at its end, one at a time; 0: whole windows in chunks")
    parser.add_argument("--ubatch", type=int, default=128, help="tokens computed at once")
    parser.add_argument("--depths", type=int, nargs="+", default=[4000, 7700], help="tokens of a look-up, question included")
    parser.add_argument("--questions", type=int, default=40, help=f"look-ups of each kind and depth, in whole groups of {GROUP}")
    parser.add_argument("--one-fact", type=int, metavar="QUESTIONS", help="those of haystacks with one fact, the slow ones (0: leave "
                        f"them out); default: as --questions, at most {MOST_ALONE}")
    parser.add_argument("--many", type=int, default=0, metavar="QUESTIONS", help=f"those of haystacks with {MANY} facts")
    parser.add_argument("--turns", type=int, default=0, metavar="QUESTIONS", help="those that follow each other in one conversation")
    parser.add_argument("--generate", type=int, default=0, metavar="TOKENS", help="to generate greedily behind the first window")
    args = parser.parse_args()
    more = list(json.loads(args.settings.read_text(encoding="utf-8")).items()) if args.settings else []
    args.settings, args.one_fact = args.setting + more, min(args.questions, MOST_ALONE) if args.one_fact is None else args.one_fact
    args.questions, args.one_fact = (-(-count // GROUP) * GROUP for count in (args.questions, args.one_fact))
    if args.one_fact < 0 or min(args.window - 1, args.windows, args.ubatch, args.questions, *args.depths) < 1:
        parser.error("--window must be at least 2 tokens; --windows, --ubatch, --depths and --questions at least 1")
    return args


def main():
    args = parse()
    tokenizer = Tokenizer(args.folder)
    ids = np.array(tokenizer.encode(args.text.read_text(encoding="utf-8"), special=False), np.int64)
    args.windows = min(args.windows, len(ids) // args.window)
    if not args.windows:
        raise SystemExit(f"{args.text}: {len(ids)} tokens, less than a window of {args.window}; give a longer text or a smaller --window")
    records = run_settings(args, tokenizer, ids)
    print(table(records, args))
    print(f"\n{args.windows} windows of {args.window:,} tokens, {args.ubatch} at once. Points: all look-ups, paired with "
          f"{records[0]['name']}'s, 95 % interval (Newcombe's method 10, haystacks as clusters).")


if __name__ == "__main__":
    main()
