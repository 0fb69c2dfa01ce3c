"""edgeattn chat: talk to a model in the terminal, or through a pipe (one line, one turn)."""
import argparse
import sys

from edgeattn.apps import options
from edgeattn.apps.session import SessionFile, add_session

HELP = "talk to a model; each line of piped text is one turn"
COMMANDS = """/help    this list
/clear   forget the conversation (the system prompt stays)
/stats   timings and memory
/exit    leave; so does Ctrl-D
A line that ends in \\ goes on in the next. Ctrl-C stops an answer; what was said so far is kept."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_prompt(parser, "the first thing to say")
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="instructions that stand before the conversation")
    parser.add_argument("-st", "--single-turn", action="store_true", help="leave after the first answer")
    add_session(parser, "go on with the conversation in FILE, if there is one, and save it there after every answer")
    options.add_model(parser)
    options.add_sampling(parser, predict=-1)
    options.add_shift(parser, "the system prompt, or 32")


def main(args: argparse.Namespace) -> int:
    first, sampling, kept = options.read_prompt(args), options.sampler_options(args), SessionFile(args.session)
    shift = options.context_shift(args)
    from edgeattn.apps import models
    from edgeattn.conversation import Conversation
    model, tokenizer = models.load(args, chat=True)
    conversation = Conversation(model, tokenizer, sampling, args.system_prompt, args.predict, tuple(args.stop), shift=shift)
    _restore(conversation, kept)
    if sys.stdin.isatty():
        _greet(model)
    try:
        if first:
            if sys.stdin.isatty():
                print(f"> {first}", file=sys.stderr)
            _answer(conversation, first, kept)
        if not (args.single_turn and first):
            for line in _lines():
                if not _turn(conversation, model, line, kept) or args.single_turn:
                    break
    finally:
        _save(conversation, kept)
    models.explain(args, model)
    return 0


def _restore(conversation, kept):
    def load(path):
        conversation.restore(path)
        return True
    if kept.restore(load):
        kept.restored = conversation.tokens
        print(f"session {kept.path}: {len(conversation.messages)} messages, {conversation.tokens} tokens in the cache", file=sys.stderr)
    kept.unchanged(list(conversation.messages))


def _save(conversation, kept):
    kept.save(conversation.save, list(conversation.messages))


def _greet(model):
    print(f"{model.config['architecture']}, {model.config['precision']}, context {model.ctx_size} tokens, {model.threads} threads. "
          "/help lists commands, Ctrl-D leaves.", file=sys.stderr)


def _turn(conversation, model, line, kept):
    """Answer a line or obey a command; False to leave."""
    command = line.strip()
    if command == "/exit":
        return False
    if command == "/clear":
        conversation.clear()
        print("forgotten", file=sys.stderr)
    elif command == "/stats":
        print(_stats(conversation, model), file=sys.stderr)
    elif command.startswith("/") and command[1:].isalpha():
        print(COMMANDS if command == "/help" else f"no command {command}; /help lists them", file=sys.stderr)
    elif command:
        _answer(conversation, line, kept)
    return True


def _answer(conversation, text, kept):
    from edgeattn.apps import terminal
    try:
        events = conversation.say(text)
    except ValueError as error:
        if not sys.stdin.isatty():
            raise
        print(f"error: {error}", file=sys.stderr)
        return
    try:
        with terminal.interruptible(conversation.cancel):
            terminal.show(conversation.last, events)
    except KeyboardInterrupt:  # a second Ctrl-C, or one just as the answer began: the program stays
        print(file=sys.stderr)
    finally:
        events.close()  # or an interrupted answer is not among the messages yet
    kept.tell_reuse(conversation.last.timings)
    _save(conversation, kept)
    if conversation.last.finish_reason == "context":
        print("the context is full: /clear starts afresh, --context-shift goes on, or raise -c (if the model allows it)", file=sys.stderr)
    terminal.tell_shift(conversation.last)


def _stats(conversation, model):
    from edgeattn.apps import terminal
    memory = ", ".join(f"{name.replace('_', ' ')} {terminal.size(value)}" for name, value in model.memory().items())
    last = terminal.timing_line(conversation.last) if conversation.last else "nothing said yet"
    return f"{last}\ncontext {conversation.tokens} of {model.ctx_size} tokens\nmemory: {memory}"


# ---- lines ---------------------------------------------------------------------------------------------------------
def _lines():
    """What the user types, until the end of input."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with _history():
        while True:
            try:
                yield _read()
            except KeyboardInterrupt:  # at the prompt: drop the line
                print(file=sys.stderr)
            except EOFError:
                print(file=sys.stderr)
                return


def _read():
    line = _ask("> ")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + _ask(". ")
    return line


def _ask(prompt):
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)  # input() would write it among the answers
    return input()


class _history:
    """Lines of earlier chats, on the arrow keys."""

    def __enter__(self):
        from edgeattn.apps.models import cache_folder
        try:
            import readline
        except ImportError:  # some builds of Python have none
            self._readline = None
            return
        self._readline, self._path = readline, cache_folder().parent / "history"
        try:
            readline.read_history_file(self._path)
        except OSError:
            pass
        readline.set_history_length(1000)

    def __exit__(self, *exception):
        if self._readline is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._readline.write_history_file(self._path)
        except OSError:  # a read-only home is no reason to complain
            pass
