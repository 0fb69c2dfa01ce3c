"""Perplexity on held-out text and look-ups of one planted fact, of checkpoints in turn, by transformers in float32 (needs accelerate).

Usage: evaluate.py TEXT FOLDER [FOLDER ...] [--window 1024] [--windows 12] [--lookups 10]
"""
import argparse

import numpy as np
import torch
from facts import ADJECTIVES, NOUNS
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def perplexity(model, windows):
    losses = []
    for ids in windows:
        logits = model(torch.tensor(ids)[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none"))
    return float(torch.cat(losses).mean().exp())


def lookup(rng, tokenizer, ids, length):
    """A chat whose text hides one code and asks for it, and the code."""
    name, code = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}", str(rng.integers(10_000, 100_000))
    start, at = int(rng.integers(0, len(ids) - length)), int(rng.integers(0, length))
    before, after = (tokenizer.decode(ids[a:b]) for a, b in ((start, start + at), (start + at, start + length)))
    text = f"{before} The secret code of the {name} is {code}.{after}"
    return [{"role": "user", "content": f"{text}\nWhat is the secret code of the {name}?"}], code


@torch.no_grad()
def answer(model, tokenizer, chat):
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1]:])


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("text")
    ap.add_argument("folders", nargs="+")
    ap.add_argument("--window", type=int, default=1024)
    ap.add_argument("--windows", type=int, default=12)
    ap.add_argument("--lookups", type=int, default=10)
    args = ap.parse_args()
    torch.compiler.set_stance("force_eager")
    for folder in args.folders:
        model = torch.nn.Module.float(AutoModelForCausalLM.from_pretrained(folder).eval())  # also what is float8
        tokenizer, rng = AutoTokenizer.from_pretrained(folder), np.random.default_rng(0)
        ids = tokenizer(open(args.text, encoding="utf-8").read())["input_ids"]
        step = len(ids) // max(args.windows, 1)
        if args.windows:
            value = perplexity(model, [ids[i * step:i * step + args.window] for i in range(args.windows)])
            print(f"{folder}: perplexity {value:.1f} over {args.windows} windows of {args.window} tokens", flush=True)
        found = [code in answer(model, tokenizer, chat) for chat, code in
                 (lookup(rng, tokenizer, ids, args.window - 80) for _ in range(args.lookups))]
        print(f"{folder}: {sum(found)} of {len(found)} facts found in about {args.window} tokens", flush=True)


if __name__ == "__main__":
    main()
