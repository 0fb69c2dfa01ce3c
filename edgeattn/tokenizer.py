"""Text to tokens and back: tokenizer.json, the chat template in a process of its own, and a stream that never splits a character."""
import base64
import json
import math
from functools import cached_property
from pathlib import Path

from edgeattn.folder import inside, read_json
from edgeattn.templates import TemplateProcess

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
BROKEN = "\N{REPLACEMENT CHARACTER}"
LARGEST = 128 << 20    # bytes of tokenizer.json; the longest in use have 33 million
MOST_GROWTH = 64       # characters that normalizers or decoders may make of one
MOST_ADDED = 1024      # special tokens that stand around a text
LONGEST_TEMPLATE = 1 << 20


class Tokenizer:
    """The tokenizer of one checkpoint or exported folder."""

    def __init__(self, folder: str | Path):
        from tokenizers import Tokenizer as Backend
        self.folder, self._templates = Path(folder), TemplateProcess()
        path = inside(self.folder, "tokenizer.json")
        if not path.is_file():
            raise ValueError(f"{self.folder}: no tokenizer.json; convert the tokenizer first with transformers' "
                             f"AutoTokenizer.from_pretrained(...).save_pretrained(...)")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path}: has {path.stat().st_size >> 20} MiB, and tokenizers at most {LARGEST >> 20}")
        self.backend = self._guarded(Backend.from_file, str(path), why="not a readable tokenizer.json")
        self.backend.no_truncation()  # some files carry a limit from training
        self.backend.no_padding()
        self._check_growth()
        self.config = _read_json(self.folder, "tokenizer_config.json")
        self.special = _special_tokens(self.folder, self.config)
        self.bos_id = self._id(self.special.get("bos_token"))
        self.end_tokens = self._end_tokens()

    def _guarded(self, call, *args, why="failed", **options):
        """The library's errors, bare Exceptions and panics of its Rust code that are no Exceptions, as ValueErrors of one line."""
        try:
            return call(*args, **options)
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            raise ValueError(f"{self.folder / 'tokenizer.json'}: {why} ({' '.join(str(error).split())[:300]})") from None

    def _check_growth(self):
        """A text must not become a thousand times as long, step by step: memory would not hold it, and Rust ends the process."""
        for part in ("normalizer", "decoder", "post_processor"):
            state = getattr(self.backend, part)
            growth, added = _growth(json.loads(state.__getstate__())) if state is not None else (1, 0)
            if growth > MOST_GROWTH or added > MOST_ADDED:
                raise ValueError(f"{self.folder / 'tokenizer.json'}: its {part} makes texts many times as long; no tokenizer needs that")

    def _id(self, token):
        return None if token is None else self.backend.token_to_id(token)

    def _end_tokens(self):
        """Whatever any of the files calls an end: chat models often list a second one in only one of them."""
        exported = _read_json(self.folder, "edgeattn.json").get("model", {})
        found = [exported.get("eos_token_ids") if isinstance(exported, dict) else None, self._id(self.special.get("eos_token"))]
        found += [_read_json(self.folder, name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
        ends = [i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids])]
        if not all(type(i) is int for i in ends):
            raise ValueError(f"{self.folder}: eos_token_id must be a token id or a list of them, got {str(ends)[:80]}")
        return frozenset(ends)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model expects around plain text (a begin token), once."""
        found = self._guarded(self.backend.encode_batch, [_valid(text)], add_special_tokens=special)  # encode would stop all other threads
        ids = found[0].ids
        if special and self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            return ids[1:]
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._guarded(self.backend.decode, list(ids), skip_special_tokens=True)

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
            return self._templates.render(self._template, variables)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None

    @cached_property
    def _template(self):
        return _chat_template(self.folder, self.config)


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
def _read_json(folder, name):
    path = inside(folder, name)
    return read_json(path) if path.is_file() else {}


def _special_tokens(folder, config):
    """{"bos_token": "<s>", ...}; the files hold a string or a description with its content."""
    both = {**_read_json(folder, "special_tokens_map.json"), **config}
    found = {name: both[name] for name in SPECIAL if both.get(name) is not None}
    found = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    for name, token in found.items():
        if not isinstance(token, str) or not _is_text(token):
            raise ValueError(f"{folder}: {name} must be the text of a token, got {str(token)[:40]!r}")
    return found


def _chat_template(folder, config):
    path = inside(folder, "chat_template.jinja")
    if path.is_file():
        if path.stat().st_size > LONGEST_TEMPLATE:
            raise ValueError(f"{path}: has more than {LONGEST_TEMPLATE >> 20} MiB, which no chat template needs")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8 ({error})") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default") or next(iter(named.values()), None)
    if not template:
        raise ValueError(f"{folder}: this model has no chat template (it is probably a base model); "
                         f"use `edgeattn generate`, or put a chat_template.jinja into the folder")
    if not isinstance(template, str) or len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"{folder}: the chat template must be a text of at most {LONGEST_TEMPLATE >> 20} million characters")
    return template


# ---- limits --------------------------------------------------------------------------------------------------------
def _is_text(token):
    try:
        return bool(token.encode())
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold and the library cannot
        return False


def _growth(state) -> tuple[float, int]:
    """(the most characters, or copies of a text, that a part of a tokenizer makes of one; how many tokens it adds)"""
    parts = [part for name in ("normalizers", "decoders", "processors", "pretokenizers") for part in state.get(name) or ()]
    if parts:
        factors, added = zip(*map(_growth, parts))
        return math.prod(factors), sum(added)
    if state["type"] == "Replace":
        old, new = state["pattern"].get("String"), len(state["content"])
        return max(1.0, new / len(old) if old else new + 1.0), 0
    if state["type"] == "Prepend":
        return 1.0, len(state["prepend"])
    if state["type"] == "Precompiled" and state.get("precompiled_charsmap"):
        raw = base64.b64decode(state["precompiled_charsmap"])
        return max(map(len, raw[4 + int.from_bytes(raw[:4], "little"):].split(b"\0"))), 0
    if state["type"] == "TemplateProcessing":
        pieces = max(state["single"], state["pair"], key=len)
        copies = max(sum(1 for piece in state["single"] if "Sequence" in piece), 1)
        tokens = max((len(token["ids"]) for token in state["special_tokens"].values()), default=0)
        return copies, len(pieces) * max(tokens, 1)
    return 1.0, 0
