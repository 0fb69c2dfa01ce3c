"""What exports in few bits lose: perplexity, KL divergence, agreement and look-ups, against another export of the same model.

    python benchmarks/quality.py FOLDER ... --against FP32_FOLDER --text book.txt --out quality.jsonl

Perplexity, KL (of the next-token distributions, natural log) and top-1 agreement are over windows spread evenly over the text, every
position. Look-ups plant eight facts in 4,000 tokens of it and ask for each. All exports see the same tokens, read whole from a 16-bit
cache. --out keeps results, one line an export, and exports that it holds are not measured again.
"""
import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from edgeattn.apps.eval_table import change
from edgeattn.apps.table import markdown
from edgeattn.cache.options import CacheOptions
from edgeattn.evaluation import kld
from edgeattn.evaluation.lookups import GROUP, look_up
from edgeattn.evaluation.statistics import difference
from edgeattn.evaluation.windows import log_probabilities
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions
from edgeattn.tokenizer import Tokenizer

def load(folder):
    return Model.load(folder, cache=CacheOptions(k_type="f16", v_type="f16"), sparse=SparseOptions("off"), prefill=PrefillOptions("off"))


def windows(ids: np.ndarray, size: int, count: int) -> list[np.ndarray]:
    """[count][size], spread evenly over the text; fewer when it is too short."""
    most = len(ids) // size
    return [ids[i * size:(i + 1) * size] for i in np.linspace(0, most - 1, min(count, most)).astype(int)]


class Comparison:
    """What all exports are compared with, made when the first one needs it, and the progress of it all."""

    def __init__(self, args, tokenizer, ids, progress):
        self.args, self.tokenizer, self.ids, self.progress = args, tokenizer, ids, progress
        self.parts, self._base = windows(ids, args.window, args.windows), None

    def base(self) -> np.ndarray:
        """Records as a base file of `edgeattn eval kld` holds them."""
        if self._base is None:
            advance, model = self._advance(f"{self.args.against.name}: text", self.args.window * len(self.parts)), load(self.args.against)
            self._base = np.empty((len(self.parts), self.args.window), kld.layout(model.vocab_size))
            self._base["token"] = self.parts
            for window, part in zip(self._base, self.parts):
                for start, logs, _ in log_probabilities(model, part, 0):
                    window["logs"][start:start + len(logs)] = logs
                    advance(len(logs))
        return self._base

    def measure(self, folder, alone=False) -> dict:
        """A line of the results. alone: of what the others are compared with."""
        base, model = self.base(), load(folder)
        if alone:
            losses = [kld.loss(window["logs"], part, 0) for window, part in zip(base, self.parts)]
            found = {"perplexity": float(np.exp(np.mean(losses)))}
        else:
            outcome = kld.compare(model, base, 0, self._advance(f"{folder.name}: text", base.size))
            found = {"perplexity": outcome.metrics["perplexity"], "kl": outcome.score()[0], "top1": outcome.metrics["same top"]}
        right = []
        if self.args.lookups:
            advance = self._advance(f"{folder.name}: look-ups", self.args.lookups)
            right = look_up(model, self.tokenizer, self.ids.tolist(), self.args.depth, GROUP, self.args.lookups, advance)["right"]
        about = json.loads((folder / "edgeattn.json").read_text(encoding="utf-8"))
        return {"name": folder.name, **found, "right": right, "mixed": about.get("mixed"),
                "bytes": (folder / "model.onnx.data").stat().st_size}

    def _advance(self, what, total):
        task = self.progress.add_task(what, total=total)
        return lambda n: self.progress.advance(task, n)


def measure_all(args, comparison) -> list[dict]:
    """One record an export, `against` first, from the file or measured now."""
    known = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()] if args.out and args.out.is_file() else []
    records = []
    for folder in (args.against, *args.folders):
        run = {"model": digest(folder / "edgeattn.json"), "against": digest(args.against / "edgeattn.json"), "text": digest(args.text),
               **{name: getattr(args, name) for name in ("window", "windows", "lookups", "depth")}}
        record = next((r for r in known if r["run"] == run), None)
        if record is None:
            record = {"run": run, **comparison.measure(folder, alone=folder == args.against)}
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        records.append(record | {"name": folder.name})
    return records


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def table(records) -> str:
    base, *others = records
    lines = [["export", "MB", "perplexity", "KL", "top-1", "look-ups", "points", "bits", "KL predicted, measured on own text"]]
    for record in records:
        asked = np.size(record["right"])
        cells = [record["name"], f"{record['bytes'] / 1e6:.1f}", f"{record['perplexity']:.2f}", "", "",
                 f"{np.sum(record['right']):.0f} of {asked}" if asked else "", "", "", ""]
        if record is not base:
            cells[2] += f" ({100 * (record['perplexity'] / base['perplexity'] - 1):+.1f} %)"
            cells[3:5] = f"{record['kl']:.4f}", f"{100 * record['top1']:.1f} %"
            if asked:
                cells[6] = change("share", *difference(record["right"], base["right"]))
        if mixed := record["mixed"]:
            cells[7:] = [f"{mixed['bits']:.2f}", f"{mixed['predicted_kl']:.3f}, {mixed['measured_kl']:.3f}"]
        lines.append(cells)
    return markdown(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--against", type=Path, required=True, help="the export to compare with: the fp32 one")
    parser.add_argument("--text", type=Path, required=True, help="text that the model has not seen, UTF-8")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="results are added here; exports already there are not run again")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--lookups", type=int, default=200, help=f"in whole groups of {GROUP}; 0: none")
    parser.add_argument("--depth", type=int, default=4000, help="tokens of a look-up prompt")
    args = parser.parse_args()
    tokenizer = Tokenizer(args.against)
    ids = np.array(tokenizer.encode(args.text.read_text(encoding="utf-8"), special=False), np.int64)
    if len(ids) < args.window:
        raise SystemExit(f"{args.text}: {len(ids)} tokens, less than a window of {args.window}; give a longer text or a smaller --window")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        records = measure_all(args, Comparison(args, tokenizer, ids, progress))
    print(table(records))
    print(f"\n{min(args.windows, len(ids) // args.window)} windows of {args.window:,} tokens; look-ups in {args.depth:,}. Points: of "
          f"look-ups, paired with {records[0]['name']}'s, 95 % interval (Newcombe's method 10, haystacks as clusters).")


if __name__ == "__main__":
    main()
