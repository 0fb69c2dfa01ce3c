"""edgeattn generate: continue a text."""
import argparse
import sys

from edgeattn.apps import options

HELP = "continue a text, as given (no chat template); the prompt is -p, -f or stdin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_prompt(parser, "the text to continue")
    options.add_model(parser)
    options.add_sampling(parser, predict=256)


def main(args: argparse.Namespace) -> int:
    prompt = options.read_prompt(args)
    if prompt is None:
        if sys.stdin.isatty():
            raise ValueError("no prompt: give -p TEXT or -f FILE, or pipe text in")
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt:
        raise ValueError("the prompt is empty: give -p TEXT or -f FILE, or pipe text in")
    sampling = options.sampler_options(args)

    from edgeattn.apps import models, terminal
    from edgeattn.generation import generate
    model, tokenizer = models.load(args)
    run = generate(model, tokenizer, model.new_sequence(), tokenizer.encode(prompt), sampling, args.predict, tuple(args.stop))
    with terminal.interruptible(run.cancel):
        terminal.show(run, run)
    print(f"{terminal.timing_line(run)} | seed {run.seed}", file=sys.stderr)
    return 130 if run.finish_reason == "cancelled" else 0
