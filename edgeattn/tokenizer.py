"""Text to tokens and back: tokenizer.json, the chat template in a sandbox, and a stream that never splits a character."""
import json
from datetime import datetime
from functools import cached_property
from pathlib import Path

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
BROKEN = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The tokenizer of one checkpoint or exported folder."""

    def __init__(self, folder: str | Path):
        from tokenizers import Tokenizer as Backend
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{self.folder}: no tokenizer.json; convert the tokenizer first with transformers' "
                             f"AutoTokenizer.from_pretrained(...).save_pretrained(...)")
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from error
        self.backend.no_truncation()  # some files carry a limit from training
        self.backend.no_padding()
        self.config = _read_json(self.folder / "tokenizer_config.json")
        self.special = _special_tokens(self.folder, self.config)
        self.bos_id = self._id(self.special.get("bos_token"))
        self.end_tokens = self._end_tokens()

    def _id(self, token):
        return None if token is None else self.backend.token_to_id(token)

    def _end_tokens(self):
        """Whatever any of the files calls an end: chat models often list a second one in only one of them."""
        exported = _read_json(self.folder / "edgeattn.json").get("model", {})
        found = [exported.get("eos_token_ids"), self._id(self.special.get("eos_token"))]
        found += [_read_json(self.folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
        return frozenset(i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids]))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model expects around plain text (a begin token), once."""
        ids = self.backend.encode(_valid(text), add_special_tokens=special).ids
        if special and self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            return ids[1:]
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def stream(self, continues: bool = False) -> "Stream":
        """A detokeniser; `continues`: other text stands before, so that SentencePiece's first space is part of this one."""
        return Stream(self, continues)

    @cached_property
    def anchor(self) -> list[int]:
        """A token that stands for any text before: decoders treat the first token of all in their own way."""
        return self.encode("a", special=False)[-1:]

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation; the template writes the begin token itself where the model has one."""
        return self.encode(self.render(messages, add_generation_prompt), special=False)

    def render(self, messages: list[dict], add_generation_prompt: bool = True, tools: list[dict] | None = None) -> str:
        """The conversation, [{"role": ..., "content": ...}], as the text the model was trained on. tools: functions that it may call, as
        in OpenAI's API, for templates that show them."""
        variables = dict(self.special, messages=messages, add_generation_prompt=add_generation_prompt, tools=tools, documents=None)
        try:
            return self._template.render(variables)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ValueError(f"{self.folder}: the chat template failed: {error}") from error

    @cached_property
    def _template(self):
        try:
            return _environment().from_string(_chat_template(self.folder, self.config))
        except TemplateError as error:
            raise ValueError(f"{self.folder}: the chat template is not valid Jinja: {error}") from error


class Stream:
    """Tokens in, text out; what a later token could still change is held back.

    Tokens are kept until their text is complete, and always decoded together, so that every kind of decoder (byte-level,
    SentencePiece, byte fallback) is treated alike.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool = False):
        self._tokenizer = tokenizer
        self._before = tokenizer.anchor if continues else []
        self._tokens, self._shown = [], 0  # tokens whose text is not all out, and how many of its characters are

    def _text(self):
        return self._tokenizer.decode(self._before + self._tokens)[len(self._tokenizer.decode(self._before)):]

    def add(self, token: int) -> str:
        """The text that this token completes, often all of its own."""
        self._tokens.append(token)
        text = self._text()
        held = min(len(text) - len(text.rstrip(BROKEN)), 3)  # an unfinished character is at most three bytes
        new = text[self._shown:len(text) - held]
        self._shown += len(new)
        if text and not held:
            self._before, self._tokens, self._shown = self._tokenizer.anchor, [], 0
        return new

    def flush(self) -> str:
        """What is left at the end, unfinished characters as U+FFFD."""
        new, self._tokens, self._shown = self._text()[self._shown:], [], 0
        return new


def _valid(text):
    """Bytes of a command line that are no UTF-8 arrive as lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()


# ---- files -----------------------------------------------------------------------------------------------------
def _read_json(path):
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def _special_tokens(folder, config):
    """{"bos_token": "<s>", ...}; the files hold a string or a description with its content."""
    both = {**_read_json(folder / "special_tokens_map.json"), **config}
    found = {name: both[name] for name in SPECIAL if both.get(name) is not None}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


def _chat_template(folder, config):
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default") or next(iter(named.values()), None)
    if not template:
        raise ValueError(f"{folder}: this model has no chat template (it is probably a base model); "
                         f"use `edgeattn generate`, or put a chat_template.jinja into the folder")
    return template


# ---- the template's world ------------------------------------------------------------------------------------------
class _Generation(Extension):
    """{% generation %} marks what a trainer learns from; here its body is just text."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _environment():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own filter escapes < > & for web pages, which the models never saw.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form):
    return datetime.now().strftime(form)


def _raise_exception(message):
    raise TemplateError(message)
