"""Writes the text in which `edgeattn eval` hides facts, edgeattn/evaluation/haystack.txt: what nano says when nobody asks.

    edgeattn export models/nano -o nano-fp32 --precision fp32 && python benchmarks/haystack.py nano-fp32

Sampled at temperature 0.9 with seeds 0, 1, 2 ..., 400 tokens each; what ends early is left out. On another machine than ours (AVX-512, 2
threads) a last digit may choose another word, and all that follows: the file is kept, not made anew.
"""
import argparse
from pathlib import Path

import edgeattn.evaluation
from edgeattn.generation import Sampler, SamplerOptions
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer

OPENINGS = "The", "When the", "In the morning", "It was", "She", "After", "He had", "There was", "On the", "They", "At last", "From the"
TOKENS = 400


def say(model, tokenizer, seeds) -> list[str]:
    """A text for each seed that does not end early; all in one batch."""
    said, live = {}, []
    for seed in seeds:
        ids, sampler = tokenizer.encode(OPENINGS[seed % len(OPENINGS)]), Sampler(SamplerOptions(0.9, 0, 0.95, 0.02, seed=seed))
        live.append((seed, model.new_sequence(), ids, sampler))
    work = [(sequence, ids) for _, sequence, ids, _ in live]
    for _ in range(TOKENS):
        rows, going = model.forward(work), []
        for row, one in zip(rows, live):
            _, sequence, ids, sampler = one
            ids.append(sampler(row, ids))
            if ids[-1] in tokenizer.end_tokens:
                model.free(sequence)
            else:
                going.append(one)
        live = going
        work = [(sequence, ids[-1:]) for _, sequence, ids, _ in live]
    for seed, sequence, ids, _ in live:
        model.free(sequence)
        text = tokenizer.decode(ids)
        said[seed] = text[:max(text.rfind(". "), text.rfind(".\n")) + 1] or text
    return list(said.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="nano, exported to fp32")
    parser.add_argument("--seeds", type=int, default=48, help="from 0 on (48)")
    parser.add_argument("-o", type=Path, default=Path(edgeattn.evaluation.__file__).with_name("haystack.txt"))
    args = parser.parse_args()
    model, tokenizer = Model.load(args.folder, threads=2), Tokenizer(args.folder)
    parts = [text for first in range(0, args.seeds, 16) for text in say(model, tokenizer, range(first, min(first + 16, args.seeds)))]
    args.o.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
