"""edgeattn eval: what a setting of cache and attention costs in quality, task by task, beside the first setting of the call."""
import argparse
import json
from pathlib import Path

from edgeattn.apps import axes, options

HELP = "measure quality: perplexity, KL divergence, look-ups, RULER-style tasks, question answering; several settings side by side"
TASKS = ("perplexity", "kld", "needle", "recall", "multi_key", "multi_value", "multi_query", "variable_tracking", "common_words",
         "frequent_words", "docqa", "masks")  # edgeattn.evaluation.TASKS, which --help does not wait for
GROUPS = {"ruler": TASKS[4:10]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("tasks", type=_tasks, metavar="TASK[,TASK]", help=f"{', '.join(TASKS)}; ruler: six of them; docs/evaluation.md says what each is")
    add("--lengths", type=options.numbers(64), metavar="N[,N]", help="tokens of a prompt or of a window of text (4000; texts 4096; as far "
        "as the context reaches)")
    add("--samples", type=options.whole(1), metavar="N", help="questions of a task and length, in whole groups (40; recall 32 of each "
        "kind; docqa 100); of texts: windows (4); of masks: all of them (1)")
    add("-s", "--seed", type=options.whole(0), default=0, metavar="N", help="of what is made up (0)")
    add("--text", metavar="FILE", help="text to read, or to hide facts in, that the model has not seen (nano's own writing; perplexity "
        "needs a file)")
    add("--documents", metavar="FILE", help='docqa: {"context": ..., "question": ..., "answers": [...]} a line')
    add("--decode", type=options.whole(0), default=128, metavar="N", help="perplexity, kld: tokens at the end of a window that are "
        "computed one at a time, as generated ones are: sparse attention is about these (128)")
    add("--save-base", metavar="FILE", help="kld: keep the first setting's probabilities, to compare other models with")
    add("--base", metavar="FILE", help="kld: compare with these instead of the first setting")
    add("--out", metavar="FILE.jsonl", help="add results to a file as they are made; what it holds is not measured again")
    add("-o", "--output", choices=("md", "jsonl"), default="md", help="what is printed (md)")
    axes.add_model(parser)
    parser.epilog = ("Flags of the model, the KV cache and sparse attention take several values with commas between them: every "
                     "combination is a setting, and each is compared with the first, question by question.")


def _tasks(text):
    found = [name for part in text.split(",") for name in GROUPS.get(part, (part,))]
    for name in found:
        if name not in TASKS:
            raise argparse.ArgumentTypeError(f"no task {name!r}; tasks are {', '.join(TASKS)}, and ruler")
    return list(dict.fromkeys(found))


def main(args: argparse.Namespace) -> int:
    settings = axes.expand(args)
    for _, one in settings:
        axes.check(one)
    if args.base and args.save_base:
        raise ValueError("--base is read and --save-base is written: give one of them")
    if (args.base or args.save_base) and "kld" not in args.tasks:
        raise ValueError("--base and --save-base are the task kld's: name it, or leave them out")
    for path in (args.text, args.documents, args.base):
        if path and not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
    from edgeattn.apps.record import ready
    for path in (args.out, args.save_base):
        ready(path)
    from edgeattn.apps.eval_run import Evaluation
    from edgeattn.apps.eval_table import table
    records = []
    for record in Evaluation(args, settings).records():
        records.append(record)
        if args.output == "jsonl":
            print(json.dumps(record), flush=True)
    if args.output == "md":
        print(table(records))
    return 0
