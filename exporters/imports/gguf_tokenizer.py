"""A GGUF file's vocabulary as tokenizer.json, chat_template.jinja and tokenizer_config.json.

The file has tokens, their kinds and their merges or scores, and only the name of the rule by which text is split before merging
("tokenizer.ggml.pre"): the rules stand here, as the models' own tokenizer.json has them.
"""
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # kinds of tokens
LONGEST_TOKEN = 1024
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's

_SMALL = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_LARGE = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama3": rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}",
    "qwen2": rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_END}",
    "tekken": rf"{_SMALL}|{_LARGE}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_END}",
    "gpt2": None,    # the regular expression that ByteLevel has built in
    "digits": None,  # that, after every digit is on its own
}
RULES = {"llama-bpe": "llama3", "llama3": "llama3", "llama-v3": "llama3", "falcon3": "llama3", "smaug-bpe": "llama3", "qwen2": "qwen2",
         "deepseek-r1-qwen": "qwen2", "tekken": "tekken", "gpt-2": "gpt2", "default": "gpt2", "smollm": "digits", "starcoder": "digits",
         "refact": "digits", "command-r": "digits"}


def write_tokenizer(path: Path, settings: dict, folder: Path) -> bool:
    """Write what `settings` of the GGUF file at `path` say; False for a file without a vocabulary. ValueError when it is of a kind
    that is not known here."""
    ours = _ours(settings)
    if ours.get("model", "no_vocab") in ("no_vocab", "none") or not len(ours.get("tokens", ())):
        return False
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(ours["model"])
    if build is None or build is _byte_level and ours.get("pre", "default") not in RULES:
        raise ValueError(f"{path}: its tokenizer ({ours['model']!r}, {ours.get('pre', 'default')!r}) cannot be converted; put the "
                         "tokenizer.json of the original model beside the GGUF file")
    try:
        tokenizer = build(ours)
        _add_special(tokenizer, ours)
        tokenizer.save(str(folder / "tokenizer.json"))
        special = {f"{short}_token": ours["tokens"][ours[f"{name}_token_id"]] for short, name in
                   (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")) if f"{name}_token_id" in ours}
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and its Rust code panics, which are no Exceptions
        why = " ".join(repr(error).split())[:300]
        raise ValueError(f"{path}: its tokenizer is damaged ({why}); put the tokenizer.json of the original model beside it") from None
    (folder / "tokenizer_config.json").write_text(json.dumps(special, indent=1), encoding="utf-8")
    if isinstance(settings.get("tokenizer.chat_template"), str):
        (folder / "chat_template.jinja").write_text(settings["tokenizer.chat_template"], encoding="utf-8")
    return True


def check_tokenizer(path: Path, gguf: Path, settings: dict, vocab_size: int) -> None:
    """ValueError unless the tokenizer.json at `path` has the tokens of the GGUF file, as far as that names any."""
    try:
        ids = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # the library raises bare ones
        raise ValueError(f"{path}: cannot be read ({error})") from None
    tokens, kinds = _ours(settings).get("tokens", ()), _ours(settings).get("token_type", ())
    plain = [i for i in range(len(tokens)) if i >= len(kinds) or kinds[i] == NORMAL]  # others may be spelt in two ways
    if any(ids.get(tokens[i]) != i for i in plain) or max(ids.values(), default=0) >= vocab_size:
        raise ValueError(f"{path}: has other tokens than {gguf.name}; put the tokenizer.json of its original model there")


def _ours(settings):
    return {name.removeprefix("tokenizer.ggml."): value for name, value in settings.items() if name.startswith("tokenizer.ggml.")}


def _byte_level(ours):
    rule = RULES[ours.get("pre", "default")]
    merges = [tuple(merge.split(" ", 1)) for merge in ours.get("merges", [])]
    tokenizer = Tokenizer(models.BPE(_vocabulary(ours), merges, ignore_merges=rule == "llama3"))
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    first = [pre_tokenizers.Split(Regex(SPLITS[rule]), "isolated")] if SPLITS[rule] else \
        [pre_tokenizers.Digits(individual_digits=True)] if rule == "digits" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not SPLITS[rule])])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(ours):
    """Pieces are merged in the order of their scores, whatever two pieces they come from; other characters become bytes."""
    vocabulary, tokens = _vocabulary(ours), ours["tokens"]
    order = sorted(range(len(tokens)), key=lambda i: -float(ours["scores"][i]))
    merges = [(tokens[i][:at], tokens[i][at:]) for i in order for at in range(1, len(tokens[i]))
              if tokens[i][:at] in vocabulary and tokens[i][at:] in vocabulary]
    unknown = tokens[ours.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(ours.get("add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE)] * prefix + [normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *[decoders.Strip(" ", 1, 0)] * prefix])
    return tokenizer


def _vocabulary(ours):
    if max(map(len, ours["tokens"])) > LONGEST_TOKEN:  # of each one all ways to cut it in two are tried
        raise ValueError(f"it has a token of more than {LONGEST_TOKEN} characters")
    vocabulary = {token: i for i, token in enumerate(ours["tokens"])}
    if len(vocabulary) != len(ours["tokens"]):
        raise ValueError("it has a token twice")
    return vocabulary


def _add_special(tokenizer, ours):
    """Tokens that are matched whole; and the begin token before every text, where the model wants one."""
    kinds = ours.get("token_type", [])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in zip(ours["tokens"], kinds)
                                  if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in zip(ours["tokens"], kinds) if kind == USER_DEFINED])
    if ours.get("add_bos_token", ours["model"] == "llama") and "bos_token_id" in ours:
        first = ours["tokens"][ours["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A", pair=f"{first} $A $B",
                                                                 special_tokens=[(first, ours["bos_token_id"])])
