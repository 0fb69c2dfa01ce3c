"""The / commands of edgeattn chat."""
import argparse
import copy
import shlex
import sys

from edgeattn.apps import options
from edgeattn.apps.terminal import plain

NOTES = """Enter sends; Alt-Enter, a \\ at the end of a line, or \"\"\" around the text make more lines.
Ctrl-C stops an answer; what was said so far is kept. Ctrl-D leaves."""


def obey(chat, text: str) -> bool:
    """Whether the text was a command; then it was obeyed, or what is wrong with it was told."""
    name, _, argument = text.strip().partition(" ")
    if not (name.startswith("/") and name[1:].isalpha()):
        return False
    from edgeattn.apps.cli import one_line
    if name not in COMMANDS:
        print(f"no command {name}; /help lists them", file=sys.stderr)
        return True
    try:
        said = COMMANDS[name][1](chat, argument.strip())
        if said:
            print(said, file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
    return True


# ---- the conversation ----------------------------------------------------------------------------------------------
def _help(chat, argument):
    return "\n".join(f"{name:<10} {what}" for name, (what, _) in COMMANDS.items()) + "\n" + NOTES


def _clear(chat, argument):
    chat.conversation.clear()
    chat.kept.start()
    return "forgotten" + (", but kept: /load shows it" if chat.kept.on else "")


def _regen(chat, argument):
    chat.answer_again()


def _system(chat, argument):
    if not argument:
        return chat.conversation.system or "no system prompt"
    chat.conversation.replace(chat.conversation.messages, None if argument == "none" else argument)
    return "no system prompt from the next question on" if argument == "none" else "holds from the next question on"


def _stats(chat, argument):
    from edgeattn.apps import terminal
    last, model = chat.conversation.last, chat.model
    memory = ", ".join(f"{name.replace('_', ' ')} {terminal.size(value)}" for name, value in model.memory().items())
    line = terminal.timing_line(last) if last else "nothing said yet"
    sparse = terminal.sparse_state(model, chat.conversation.tokens)
    return f"{line}\ncontext {chat.conversation.tokens} of {model.ctx_size} tokens; {sparse}\nmemory: {memory}"


# ---- what is kept --------------------------------------------------------------------------------------------------
def _save(chat, argument):
    if not any(message["role"] == "user" for message in chat.conversation.messages):
        raise ValueError("nothing was said yet")
    chat.kept.on = True
    chat.kept.save(chat.conversation.messages, argument or None)
    return chat.kept.number and f"kept as conversation {chat.kept.number}; what follows is kept too"


def _load(chat, argument):
    if not argument:
        known = chat.kept.store.conversations()
        return "\n".join(f"{c['id']:>5}  {c['updated'][:10]}  {plain(c['title'])} ({c['messages']} messages)" for c in known[:20]) or \
            "no conversation is kept yet"
    messages = chat.kept.load(argument)
    chat.kept.on = chat.args.save is not False
    closed = _close(chat)
    system = next((m["content"] for m in messages if m["role"] == "system"), None)
    chat.conversation.replace(messages, system or chat.args.system_prompt)
    last = "\n".join(f"{m['role']}: {plain(m['content'])[:400]}" for m in messages[-2:])
    last += "\n(no answer yet: /regen asks again)" if messages and messages[-1]["role"] == "user" else ""
    return f"{closed}conversation {chat.kept.number}, {len(messages)} messages; it is read when you next say something\n{last}"


def _session(chat, argument):
    from edgeattn.apps.session import SessionFile
    if not argument:
        return f"session {chat.session.path}" if chat.session.path else "no session file: /session FILE saves the KV cache too"
    opened = SessionFile(argument)
    chat.save()
    if opened.exists:
        chat.kept.start()
        chat.session = opened
        chat.restore()
        return None
    chat.session = opened
    chat.save()
    return f"session {argument}: saved there after every answer"


def _close(chat):
    """Leave the session file, which another conversation must not overwrite."""
    from edgeattn.apps.session import SessionFile
    left, chat.session = chat.session.path, SessionFile(None)
    return f"session {left} is left as it is\n" if left else ""


# ---- the model -----------------------------------------------------------------------------------------------------
class _Flags(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def _kv(chat, argument):
    """Shows or changes how the cache is kept."""
    from edgeattn.apps.terminal import size
    if argument:
        args, words = copy.copy(chat.args), shlex.split(argument)
        for word in words if not words[0].startswith("-") else []:
            _short_kv(args, word)
        if words[0].startswith("-"):
            flags = {word.partition("=")[0] for word in words}
            if {"-ctk", "-ctv", "--cache-type-k", "--cache-type-v"} & flags:
                args.kv_bits = None
            elif "--kv-bits" in flags:
                args.cache_type_k = args.cache_type_v = None
            _parse(options.add_cache, args, words)
        _reload(chat, args)
    from edgeattn.memory_estimate import estimate
    cache, found = chat.model.cache, estimate(chat.model)
    full = sum(found.kv_layers) + found.kv_state
    evicts = f", evicts by {cache.options.method}" if cache.plan.evicts else ""
    return f"cache {cache.options.name}, {size(cache.used_bytes)} in use, {size(full)} when full ({chat.model.ctx_size} tokens){evicts}"


def _short_kv(args, word):
    """A type, keys/values, a budget such as 10M, or default."""
    if word == "default":
        vars(args).update(vars(_parse(options.add_cache, argparse.Namespace(), [])))
        return
    types = word.split("/")
    if set(types) <= set(options.KV_TYPES) and len(types) <= 2:
        args.kv_bits, args.cache_type_k, args.cache_type_v = None, types[0], types[-1]
        return
    try:
        args.kv_budget = options.size(word)
    except argparse.ArgumentTypeError:
        raise ValueError(f"{word!r} is no type ({', '.join(options.KV_TYPES)}), pair of types (int8/int4), budget (10M) or 'default'; or "
                         "give the command line's flags") from None


def _sparse(chat, argument):
    """Shows or changes what sparse attention does."""
    from edgeattn.apps.terminal import sparse_state
    if argument:
        args, words = copy.copy(chat.args), shlex.split(argument)
        if not words[0].startswith("-"):
            args.sparse_budget = None
            words = ["--sparse-attention", words[0], *(["--sparse-budget", *words[1:]] if words[1:] else [])]
        _reload(chat, _parse(options.add_sparse, args, words))
    model, lines = chat.model, []
    if model.scheduler:
        lines = [f"method {model.scheduler.options.method}"]
    elif model.dense_because:
        lines = [model.dense_because]
    return "; ".join([sparse_state(model, chat.conversation.tokens), *lines])


def _parse(add, args, words):
    parser = _Flags(add_help=False, allow_abbrev=False)
    add(parser)
    return parser.parse_args(words, args)


def _reload(chat, args):
    closed = _close(chat)
    chat.load_model(args)
    print(f"{closed}the conversation is read again with your next question", file=sys.stderr)


COMMANDS = {
    "/help": ("this list", _help),
    "/clear": ("start a new conversation (the system prompt stays)", _clear),
    "/regen": ("answer the last question again", _regen),
    "/system": ("show the system prompt, or set it: /system TEXT ('none': none)", _system),
    "/save": ("keep this conversation, under a title: /save TITLE", _save),
    "/load": ("list what is kept, or go on with one: /load NUMBER or TITLE", _load),
    "/session": ("keep the KV cache in a file too, or go on from one: /session FILE", _session),
    "/kv": ("show the KV cache, or change it: /kv int4, /kv int8/int4, /kv 10M, or flags", _kv),
    "/sparse": ("show sparse attention, or change it: /sparse off, /sparse quest 1024, or flags", _sparse),
    "/stats": ("timings and memory", _stats),
    "/exit": ("leave", None),
}
