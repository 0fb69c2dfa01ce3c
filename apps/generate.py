"""edgeattn generate: continue a text."""
import argparse
import sys

from edgeattn.apps import options
from edgeattn.apps.session import SessionFile, add_session

HELP = "continue a text, as given (no chat template); the prompt is -p, -f or stdin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_prompt(parser, "the text to continue")
    add_session(parser, "go on with the text in FILE, or without reading again what the prompt shares with it; save the text there")
    options.add_model(parser)
    options.add_sampling(parser, predict=256)
    options.add_shift(parser, "32")


def main(args: argparse.Namespace) -> int:
    prompt, kept = options.read_prompt(args), SessionFile(args.session)
    if prompt is None and not (kept.exists and sys.stdin.isatty()):
        if sys.stdin.isatty():
            raise ValueError("no prompt: give -p TEXT or -f FILE, or pipe text in")
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt and not kept.exists:
        raise ValueError("the prompt is empty: give -p TEXT or -f FILE, or pipe text in")
    sampling, shift = options.sampler_options(args), options.context_shift(args)

    from edgeattn.apps import models, terminal
    model, tokenizer = models.load(args)
    run, sequence = _start(model, tokenizer, prompt, sampling, shift, args, kept)
    try:
        with terminal.interruptible(run.cancel):
            terminal.show(run, run)
    finally:
        kept.save(lambda path: _save(path, model, tokenizer, sequence, run))
    kept.tell_reuse(run.timings)
    terminal.tell_shift(run)
    print(f"{terminal.timing_line(run)} | seed {run.seed}", file=sys.stderr)
    models.explain(args, model)
    return 130 if run.finish_reason == "cancelled" else 0


def _start(model, tokenizer, prompt, sampling, shift, args, kept):
    """(Generation, sequence): the prompt, or the text of the session where there is no prompt, less what the session's cache holds."""
    from edgeattn.cache import session
    from edgeattn.generation import Generation, Sampler, reuse

    def load(path):
        sequence, token_ids, meta = session.load(path, model.cache, model.config)
        if "messages" in meta:
            raise ValueError("a conversation of `edgeattn chat`, not a text")
        return sequence, token_ids, Sampler(sampling, state=None if prompt else meta.get("sampler"))
    sequence, known, sampler = kept.restore(load) or (model.new_sequence(), [], Sampler(sampling))
    if not prompt and not known:
        raise ValueError("the prompt is empty, and there is no session to go on with: give -p TEXT or -f FILE, or pipe text in")
    kept.restored, ids = sequence.length, tokenizer.encode(prompt) if prompt else known
    ids, dropped = shift.cut(ids, model.ctx_size) if shift else (ids, 0)
    shared = reuse(model, sequence, known[:sequence.length], ids)
    run = Generation(model, tokenizer, sequence, ids[shared:], sampling, args.predict, tuple(args.stop), tokenizer.end_tokens,
                     context_ids=ids[:shared], continues_text=True, sampler=sampler, shift=shift)
    run.dropped = dropped
    return run, sequence


def _save(path, model, tokenizer, sequence, run):
    from edgeattn.cache import session
    session.save(path, model.cache, sequence, run.token_ids, model.config,
                 {"text": tokenizer.decode(run.token_ids), "sampler": run.sampler.state})
