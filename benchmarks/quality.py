"""What an export loses against another one of the same model: perplexity, KL divergence, agreement, look-up of planted facts.

    python benchmarks/quality.py FOLDER --against FP32_FOLDER --text book.txt

Perplexity, KL (of the next-token distributions, natural log) and top-1 agreement are over windows of the text, every position.
The look-up plants facts in the text and asks for one: eight facts in about 4,000 tokens. Both models see the same tokens.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from edgeattn.evaluation.windows import log_softmax
from edgeattn.evaluation.words import COLOURS, PLACES
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer


def all_logits(model, ids):
    sequence = model.new_sequence()
    try:
        return model.forward([(sequence, ids)], "all")
    finally:
        model.free(sequence)


def compare_text(model, against, ids, window, windows, advance):
    """-> (perplexity of model, perplexity of against, mean KL(against || model), top-1 agreement)."""
    losses, other_losses, divergences, agreed = [], [], [], []
    for i in range(windows):
        part = ids[i * window:(i + 1) * window]
        p, q = log_softmax(all_logits(against, part)), log_softmax(all_logits(model, part))
        at = np.arange(len(part) - 1), part[1:]
        other_losses.append(-p[:-1][at])
        losses.append(-q[:-1][at])
        divergences.append((np.exp(p) * (p - q)).sum(-1))
        agreed.append(p.argmax(-1) == q.argmax(-1))
        advance()
    return (*(float(np.exp(np.concatenate(x).mean())) for x in (losses, other_losses)),
            *(float(np.concatenate(x).mean()) for x in (divergences, agreed)))


def lookup_prompt(rng, tokenizer, haystack, depth, facts):
    """Token ids of a chat whose text hides `facts` codes and asks for one, and the answer."""
    names = [f"{COLOURS[i // len(PLACES)]} {PLACES[i % len(PLACES)]}" for i in rng.permutation(len(PLACES) * len(COLOURS))[:facts]]
    codes = [str(rng.integers(10_000, 100_000)) for _ in names]
    planted = [tokenizer.encode(f" The secret code of the {name} is {code}.") for name, code in zip(names, codes)]
    room = depth - sum(map(len, planted)) - 40
    start = int(rng.integers(0, len(haystack) - room))
    text, cuts = [], np.sort(rng.integers(0, room, facts))
    for begin, end, fact in zip([0, *cuts], cuts, planted):
        text += [*haystack[start + begin:start + end], *fact]
    text += list(haystack[start + cuts[-1]:start + room])
    asked = int(rng.integers(facts))
    question = f"\nWhat is the secret code of the {names[asked]}?"
    before, after = tokenizer.render([{"role": "user", "content": "\0"}]).split("\0")
    return [*tokenizer.encode(before), *text, *tokenizer.encode(question + after)], codes[asked]


def answer(model, tokenizer, ids, limit=24):
    sequence = model.new_sequence()
    out = []
    try:
        logits = model.forward([(sequence, ids)])
        while len(out) < limit and int(logits[0].argmax()) not in model.config["model"]["eos_token_ids"]:
            out.append(int(logits[0].argmax()))
            logits = model.forward([(sequence, out[-1:])])
    finally:
        model.free(sequence)
    return tokenizer.decode(out)


def lookups(models, tokenizer, haystack, depth, facts, count, advance):
    """How many of `count` planted codes each model gives back."""
    rng, right = np.random.default_rng(0), [0] * len(models)
    for _ in range(count):
        ids, code = lookup_prompt(rng, tokenizer, haystack, depth, facts)
        for i, model in enumerate(models):
            right[i] += code in answer(model, tokenizer, ids)
            advance()
    return right


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, required=True, help="the folder to compare with: the fp32 export")
    parser.add_argument("--text", type=Path, required=True, help="text that the model has not seen, UTF-8")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--lookups", type=int, default=40)
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--depth", type=int, default=4000, help="tokens of a look-up prompt")
    args = parser.parse_args()
    model, against, tokenizer = Model.load(args.folder), Model.load(args.against), Tokenizer(args.folder)
    text = args.text.read_text(encoding="utf-8")
    ids = np.array(tokenizer.encode(text), np.int64)
    args.windows = min(args.windows, len(ids) // args.window)
    with Progress(console=Console(file=sys.stderr)) as progress:
        task = progress.add_task("text", total=args.windows)
        ppl, other, kl, top1 = compare_text(model, against, ids, args.window, args.windows, lambda: progress.advance(task))
        task = progress.add_task("look-up", total=2 * args.lookups)
        right = lookups([model, against], tokenizer, ids, args.depth, args.facts, args.lookups, lambda: progress.advance(task))
    print(f"perplexity {ppl:.3f}, against {other:.3f}: {100 * (ppl / other - 1):+.2f} %   ({args.windows} windows of {args.window} tokens)")
    print(f"mean KL {kl:.4f}   top-1 agreement {100 * top1:.2f} %")
    print(f"look-up of one in {args.facts} facts in {args.depth} tokens: {right[0]} of {args.lookups}, against {right[1]}")


if __name__ == "__main__":
    main()
