"""edgeattn chat: talk to a model in the terminal, or through a pipe (one line, one turn)."""
import argparse
import sys

from edgeattn.apps import options
from edgeattn.apps.session import SessionFile, add_session

HELP = "talk to a model; each line of piped text is one turn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_prompt(parser, "the first thing to say")
    parser.add_argument("-sys", "--system-prompt", metavar="TEXT", help="instructions that stand before the conversation")
    parser.add_argument("-st", "--single-turn", action="store_true", help="leave after the first answer")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, help="keep the conversation in the list that the web page shows "
                        "too (in a terminal it is kept, unless --session names a file; through a pipe it is not)")
    add_session(parser, "go on with the conversation in FILE, if there is one, and save it there after every answer")
    options.add_model(parser)
    options.add_sampling(parser, predict=-1)
    options.add_shift(parser, "the system prompt, or 32")


def main(args: argparse.Namespace) -> int:
    first, session = options.read_prompt(args), SessionFile(args.session)
    from edgeattn.apps import chat_input
    from edgeattn.apps.chat_commands import COMMANDS, obey
    chat = Chat(args, session)
    chat.restore()
    interactive = sys.stdin.isatty()
    if interactive:
        chat.greet()
    try:
        if first:
            if interactive:
                print(f"> {first}", file=sys.stderr)
            chat.answer(first)
        if not (args.single_turn and first):
            names = {name: what for name, (what, _) in COMMANDS.items()}
            for text in chat_input.typed(names, chat.status, chat.kept.on) if interactive else chat_input.piped(sys.stdin):
                if text.strip() == "/exit":
                    break
                if not obey(chat, text) and text.strip():
                    chat.answer(text)
                if args.single_turn:
                    break
    finally:
        chat.save()
    chat.explain()
    return 0


class Chat:
    """A conversation with a model, where it is kept, and how its answers are shown.

    conversation  edgeattn.conversation.Conversation
    session       the file of --session, with the KV cache
    kept          the conversation in the store
    """

    def __init__(self, args: argparse.Namespace, session: SessionFile):
        from edgeattn.apps.kept import Kept
        self.args, self.session = args, session
        self._sampling, self._shift = options.sampler_options(args), options.context_shift(args)
        self.conversation = None
        self.load_model(args)
        source = self.model.config["source"]
        keep = args.save if args.save is not None else sys.stdin.isatty() and not args.session
        self.kept = Kept(keep, f"{source.get('name') or source.get('folder')} {self.model.config['precision']}")

    def load_model(self, args: argparse.Namespace) -> None:
        """Go on with the model as these flags say; the conversation stays, and its cache is computed again. ValueError: as before."""
        from edgeattn.apps import models
        from edgeattn.conversation import Conversation
        model, tokenizer = models.load(args, chat=True)
        made = Conversation(model, tokenizer, self._sampling, args.system_prompt, args.predict, tuple(args.stop), shift=self._shift)
        if self.conversation:
            made.replace(self.conversation.messages, self.conversation.system)
        self.args, self.model, self.conversation, self._counted = args, model, made, None

    # ---- answers ------------------------------------------------------------------------------------------------
    def answer(self, text: str) -> bool:
        """Say something and show what is answered; True when there was an answer, also an interrupted one."""
        from edgeattn.apps import markdown_view, terminal
        conversation = self.conversation
        if conversation.messages and conversation.messages[-1]["role"] == "user":  # of a chat that was killed before the answer
            del conversation.messages[-1]
        before = len(conversation.messages)
        self._counted = self.model.scheduler.counted() if self.model.scheduler else None
        try:
            events = conversation.say(text)
        except ValueError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}", file=sys.stderr)
            return False
        self.kept.save([*conversation.messages, {"role": "user", "content": text}])  # a kill loses the answer only
        try:
            with terminal.interruptible(conversation.cancel):
                if markdown_view.can_show():
                    markdown_view.show(conversation.last, events, self.status)
                else:
                    terminal.show(conversation.last, events)
        except KeyboardInterrupt:  # a second Ctrl-C, or one just as the answer began: the program stays
            print(file=sys.stderr)
        finally:
            events.close()  # or an interrupted answer is not among the messages yet
        self.session.tell_reuse(conversation.last.timings)
        self.save()
        if conversation.last.finish_reason == "context":
            print("the context is full: /clear starts afresh, --context-shift goes on, or raise -c (if the model allows it)",
                  file=sys.stderr)
        terminal.tell_shift(conversation.last)
        return len(conversation.messages) > before

    def answer_again(self) -> None:
        """Another answer to the last question; the former one stays if none comes. ValueError: nothing was asked."""
        messages = self.conversation.messages
        asked = next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "user"), None)
        if asked is None:
            raise ValueError("nothing was asked yet")
        former = list(messages)
        del messages[asked:]
        if not self.answer(former[asked]["content"]):
            self.conversation.replace(former, self.conversation.system)
            self.save()

    def status(self) -> str:
        from edgeattn.apps.terminal import status_line
        return status_line(self.model, self.conversation.tokens, self.conversation.last, self._counted)

    # ---- what is kept -------------------------------------------------------------------------------------------
    def save(self) -> None:
        """To the session file and the store, where there is something new."""
        messages = [dict(message) for message in self.conversation.messages]
        self.session.save(self.conversation.save, messages)
        self.kept.save(messages)

    def restore(self) -> None:
        """Go on with what the session file holds, if it holds anything."""
        def load(path):
            self.conversation.restore(path)
            return True
        if self.session.restore(load):
            found = self.session.restored = self.conversation.tokens
            print(f"session {self.session.path}: {len(self.conversation.messages)} messages, {found} tokens in the cache", file=sys.stderr)
        self.session.unchanged(list(self.conversation.messages))

    # ---- words --------------------------------------------------------------------------------------------------
    def greet(self) -> None:
        about = self.model.config
        kept = "kept on this machine (--no-save: not)" if self.kept.on else "not kept"
        print(f"{about['architecture']}, {about['precision']}, context {self.model.ctx_size} tokens, {self.model.threads} threads; "
              f"{'in ' + self.session.path if self.session.path else kept}. /help lists commands, Ctrl-D leaves.", file=sys.stderr)

    def explain(self) -> None:
        from edgeattn.apps import models
        models.explain(self.args, self.model)
