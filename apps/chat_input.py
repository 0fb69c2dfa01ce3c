"""What a user of `edgeattn chat` says: lines of a pipe, or of a terminal with history, several lines and a status line."""
import os
import sys
from collections.abc import Callable, Iterator

QUOTES = '"""'


def open_ended(text: str) -> bool:
    """Whether a text asks for another line: it ends in \\, or opened three quotes and has not closed them."""
    return text.endswith("\\") or text.startswith(QUOTES) and (len(text) < 6 or not text.rstrip().endswith(QUOTES))


def joined(text: str) -> str:
    """What was meant: less the quotes around several lines, or the \\ at their ends."""
    if text.startswith(QUOTES):
        return text.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text.replace("\\\n", "\n").removesuffix("\\")


def piped(lines) -> Iterator[str]:
    """Turns of piped text: a line each, or several between three quotes."""
    held = ""
    for line in lines:
        held += line.rstrip("\n")
        if held.startswith(QUOTES) and open_ended(held):
            held += "\n"
            continue
        yield joined(held) if held.startswith(QUOTES) else held
        held = ""
    if held:  # quotes that nobody closed
        yield joined(held)


def typed(commands: dict[str, str], status: Callable[[], str], keep: bool) -> Iterator[str]:
    """Turns that are typed in a terminal, until Ctrl-D. Enter sends; Alt-Enter, a \\ at the end or three quotes make a new line.

    commands  offered after a /: name -> what it does
    status    () -> the line at the bottom
    keep      whether lines are remembered for later chats
    """
    dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")
    ask = _ask if dumb else _session(commands, status, keep).prompt
    while True:
        try:
            yield joined(ask("> "))
        except KeyboardInterrupt:  # at the prompt: drop the line
            if dumb:
                print(file=sys.stderr)
        except EOFError:
            if dumb:
                print(file=sys.stderr)
            return


def _ask(prompt):
    """In a terminal that cannot move its cursor."""
    def line(mark):
        print(mark, end="", file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)  # not among answers that go elsewhere
        return input()
    text = line(prompt)
    while open_ended(text):
        text += "\n" + line(". ")
    return text


def _session(commands, status, keep):
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output
    from prompt_toolkit.styles import Style

    class Commands(Completer):
        def get_completions(self, document, event):
            if document.text.startswith("/") and " " not in document.text:
                for name, what in commands.items():
                    if name.startswith(document.text):
                        yield Completion(name, -len(document.text), display_meta=what)
    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")
    def send_or_go_on(event):
        buffer = event.current_buffer
        buffer.insert_text("\n") if open_ended(buffer.text) else buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event):
        event.current_buffer.insert_text("\n")
    output = None if sys.stdout.isatty() else create_output(stdout=sys.stderr)  # the prompt does not belong among the answers
    return PromptSession(history=_history(keep), completer=Commands(), complete_while_typing=True, key_bindings=keys,
                         multiline=True, prompt_continuation=". ", bottom_toolbar=status, output=output,
                         style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}))


def _history(keep):
    """Lines of earlier chats, on the arrow keys; of this one only where nothing is to be kept or can be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from edgeattn.apps.store import data_folder

    class Forgiving(FileHistory):
        def store_string(self, string):
            try:
                super().store_string(string)
            except OSError:  # a full disk is no reason to leave
                pass
    if not keep:
        return InMemoryHistory()
    path = data_folder() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError:
        return InMemoryHistory()
    return Forgiving(str(path))
