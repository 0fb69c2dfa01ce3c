"""GGUF files: blocks against the gguf package, exports against transformers with the same weights, the tokenizer, the command."""
import json

import gguf_files
import numpy as np
import pytest
import quantised
import tiny
import torch
import transformers
from gguf import GGMLQuantizationType as Type

from edgeattn.exporters import check
from edgeattn.exporters.checkpoint import open_checkpoint
from edgeattn.exporters.export import export
from edgeattn.exporters.imports.gguf_blocks import TYPES, Codes
from edgeattn.exporters.interpret import interpret
from edgeattn.runtime import Model, read_config
from edgeattn.tokenizer import Tokenizer

SHAPE = dict(hidden_size=256, intermediate_size=512, head_dim=64)
KINDS = [Type(number) for number, block in TYPES.items() if isinstance(block, Codes)]
TOKENS = np.random.default_rng().integers(0, tiny.SIZES["vocab_size"], 40)
EXACT, KQUANTS = ("Q4_0", "Q5_0", "Q8_0", "TQ1_0", "TQ2_0"), ("Q2_K", "Q3_K")


def error(got, expected):
    return np.sqrt(np.square(got - expected).mean()) / expected.std()


def typical_error(got, expected):
    """Of the token in the middle: random codes have large means, which activations rounded to int8 multiply, and a few tokens get far."""
    return np.median(np.sqrt(np.square(got - expected).mean(axis=1))) / expected.std()


def logits(folder):
    model = Model.load(folder, ctx_size=len(TOKENS))
    return model.forward([(model.new_sequence(), TOKENS)], "all")


def exact_logits(folder):
    """Without the kernels' rounding of activations."""
    return interpret(folder, check._feeds(read_config(folder)["model"], TOKENS), ["logits"])["logits"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_are_what_gguf_defines(tmp_path, kind):
    model = tiny.tiny_model("llama", **SHAPE)
    exact = gguf_files.write_gguf(model, tmp_path / "model.gguf", lambda name: kind)
    source = open_checkpoint(tmp_path / "model.gguf")
    for name, expected in exact.items():
        weight, n = source.weight(name, expected.shape), len(expected)
        for start, stop in ((0, n), (0, 1), (16, 48), (n - 5, n)):
            np.testing.assert_allclose(weight.read(start, stop), expected[start:stop], atol=1e-6 * np.abs(expected).max())
        codes, scales, zeros = weight.quantised.read(0, n)  # as an export stores them: scales and zero points in float16
        stored = weight.quantised.__class__(weight.quantised.bits, weight.quantised.block_size, lambda *_: (
            codes, scales.astype(np.float16).astype(np.float32), zeros if zeros is None else zeros.astype(np.float16).astype(np.float32)))
        assert codes.dtype == np.uint8 and codes.max() < 1 << weight.quantised.bits
        assert error(stored.rows(0, n), expected) <= (0 if kind.name in EXACT else 1e-3)


def mixed(name):
    """What llama.cpp's Q4_K_M does, and more: siblings in unlike types."""
    for part, kind in (("embed", Type.Q6_K), ("v_proj", Type.Q6_K), ("down", Type.Q5_K), ("o_proj", Type.Q8_0), ("up", Type.Q5_0)):
        if part in name:
            return kind
    return Type.Q4_K


@pytest.mark.parametrize("case", ["llama", "llama_bias", "llama3_rope", "llama_linear_rope", "qwen2", "qwen3"])
def test_export_equals_transformers(tmp_path, case):
    model = tiny.tiny_model(case, **SHAPE)
    exact = gguf_files.write_gguf(model, tmp_path / "model.gguf", mixed)
    expected = tiny.torch_logits(quantised.with_weights(model, exact), TOKENS)
    report = export(tmp_path / "model.gguf", tmp_path / "out")
    assert not report["requantised"]
    assert typical_error(exact_logits(tmp_path / "out"), expected) < 3e-2  # scales and zero points were rounded to float16
    assert typical_error(logits(tmp_path / "out"), expected) < 0.3
    export(tmp_path / "model.gguf", tmp_path / "out", "fp32")
    assert error(logits(tmp_path / "out"), expected) < 1e-4


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0, Type.TQ2_0, Type.Q2_K, Type.Q3_K, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_every_width_runs(tmp_path, kind):
    model = tiny.tiny_model("llama", **SHAPE)
    exact = gguf_files.write_gguf(model, tmp_path / "model.gguf", lambda name: kind)
    expected = tiny.torch_logits(quantised.with_weights(model, exact), TOKENS)
    report = export(tmp_path / "model.gguf", tmp_path / "out", "int8")
    assert error(exact_logits(tmp_path / "out"), expected) < (3e-2 if kind.name in KQUANTS else 1e-5 if kind.name in EXACT else 0.1)
    assert typical_error(logits(tmp_path / "out"), expected) < (0.3 if kind.name in KQUANTS else 0.1)
    assert (f"int{TYPES[kind].bits}/{TYPES[kind].group}" if kind not in (Type.F16, Type.BF16, Type.Q3_K) else
            "int4/16" if kind is Type.Q3_K else "int8/32") in report["weights"].values()


def test_transformers_reads_the_same_model(tmp_path):
    """Against transformers' own reader of GGUF files: names, sizes and rotated rows are not ours alone."""
    gguf_files.write_gguf(tiny.tiny_model("llama", **SHAPE), tmp_path / "model.gguf", lambda name: Type.Q8_0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    export(tmp_path / "model.gguf", tmp_path / "out", "fp32")
    assert error(logits(tmp_path / "out"), tiny.torch_logits(model, TOKENS)) < 1e-3


TEXTS = ["The keeper of the lighthouse climbed 1234 stairs.", "  two  spaces\nand\n\n lines\t", "naïve café 北京 🙂 don't",
         "<|im_start|>user\nHi<|im_end|>"]


def test_nano_and_its_tokenizer(tmp_path, nano_checkpoint, edgeattn):
    tokenizer = json.loads((nano_checkpoint / "tokenizer.json").read_text())
    template = (nano_checkpoint / "chat_template.jinja").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(nano_checkpoint)
    gguf_files.write_gguf(model, tmp_path / "nano.gguf", lambda name: Type.Q8_0, gguf_files.nano_vocabulary(tokenizer, "smollm", template))
    done = edgeattn("export", tmp_path / "nano.gguf", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    ours, original = Tokenizer(tmp_path / "out"), Tokenizer(nano_checkpoint)
    for text in TEXTS:
        assert ours.encode(text) == original.encode(text) and ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    chat = [{"role": "user", "content": "Who?"}]
    assert ours.encode_chat(chat) == original.encode_chat(chat) and 2 in ours.end_tokens
    said = edgeattn("generate", "-m", tmp_path / "nano.gguf", "-p", "Once upon a time", "-n", "4", "--temp", "0")
    assert said.returncode == 0 and said.stdout.strip()


def header(path, **changes):
    """Rewrite the file's settings: {old bytes: new bytes} of equal length."""
    raw = path.read_bytes()
    for old, new in changes.items():
        assert raw.count(old.encode()) and len(old) == len(new)
        raw = raw.replace(old.encode(), new.encode())
    path.write_bytes(raw)


def put(path, at, value, size=8):
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + value.to_bytes(size, "little") + raw[at + size:])


def after(path, name):
    """Where the value of a setting begins (behind its name and type)."""
    return path.read_bytes().index(name.encode()) + len(name) + 4


def drop_type(path):
    """token_embd becomes of type 23, iq4_xs: the type follows two dimensions."""
    raw, name = bytearray(path.read_bytes()), b"token_embd.weight"
    raw[raw.index(name) + len(name) + 4 + 16] = 23
    path.write_bytes(bytes(raw))


BREAK = {
    "not a GGUF file": lambda p: p.write_bytes(b"GGML" + p.read_bytes()[4:]),
    "GGUF version 1 .* cannot be read": lambda p: p.write_bytes(p.read_bytes()[:4] + b"\1" + p.read_bytes()[5:]),
    "truncated, .* bytes of 'output.weight' are missing|truncated, .* bytes of 'blk": lambda p: p.write_bytes(p.read_bytes()[:-70_000]),
    "its header asks for": lambda p: p.write_bytes(p.read_bytes()[:300]),
    "its header counts 9223372036854775808 items": lambda p: put(p, 8, 1 << 63),
    "its header asks for 4611686018427387904 bytes more": lambda p: put(p, after(p, "general.architecture"), 1 << 62),
    "GGUF architecture 'lla00' cannot be read": lambda p: p.write_bytes(p.read_bytes().replace(b"llama", b"lla00")),
    "'token_embd.weight' is missing|config.json lacks|vocab_size": lambda p: header(p, **{"token_embd": "token_xxxx"}),
    "'blk.1.ffn_up.weight' is missing": lambda p: header(p, **{"blk.1.ffn_up": "blk.1.ffn_xx"}),
    "has shape .*, the file's settings ask for": lambda p: put(p, after(p, "llama.feed_forward_length"), 128, 4),
    "is of type iq4_xs, which cannot be read; supported: F32, F16, BF16, q4_0": drop_type,
}


@pytest.mark.parametrize("message", BREAK)
def test_broken_file(tmp_path, message):
    gguf_files.write_gguf(tiny.tiny_model("llama"), tmp_path / "model.gguf", lambda name: Type.Q8_0)
    BREAK[message](tmp_path / "model.gguf")
    with pytest.raises(ValueError, match=message) as caught:
        export(tmp_path / "model.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def renamed(path, old, new):
    """A copy of a tokenizer.json in which one token is another."""
    about = json.loads(path.read_text())
    about["model"]["vocab"][new] = about["model"]["vocab"].pop(old)
    about["model"]["merges"] = [m for m in about["model"]["merges"] if old not in ("".join(m).replace(" ", ""), *m)]
    return json.dumps(about)


def test_unknown_tokenizer_asks_for_a_file(tmp_path, nano_checkpoint):
    tokenizer = json.loads((nano_checkpoint / "tokenizer.json").read_text())
    model = tiny.tiny_model("llama", vocab_size=8192)
    gguf_files.write_gguf(model, tmp_path / "model.gguf", lambda name: Type.Q8_0, gguf_files.nano_vocabulary(tokenizer, "viking", ""))
    with pytest.raises(ValueError, match="its tokenizer .*'viking'.* put the tokenizer.json of the original model beside the GGUF file"):
        export(tmp_path / "model.gguf", tmp_path / "out")
    (tmp_path / "tokenizer.json").write_text(renamed(nano_checkpoint / "tokenizer.json", "\u0120the", "\u0120thy"))
    with pytest.raises(ValueError, match="tokenizer.json: has other tokens than model.gguf"):
        export(tmp_path / "model.gguf", tmp_path / "out")
    (tmp_path / "tokenizer.json").write_bytes((nano_checkpoint / "tokenizer.json").read_bytes())
    export(tmp_path / "model.gguf", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_a_file_with_a_tokenizer_needs_none_beside(tmp_path, nano_checkpoint):
    tokenizer = json.loads((nano_checkpoint / "tokenizer.json").read_text())
    model = tiny.tiny_model("llama", vocab_size=8192)
    gguf_files.write_gguf(model, tmp_path / "model.gguf", lambda name: Type.Q8_0, gguf_files.nano_vocabulary(tokenizer, "smollm", ""))
    (tmp_path / "tokenizer.json").write_text(renamed(nano_checkpoint / "tokenizer.json", "\u0120the", "\u0120thy"))  # of another model
    export(tmp_path / "model.gguf", tmp_path / "out")
    assert Tokenizer(tmp_path / "out").encode(TEXTS[0]) == Tokenizer(nano_checkpoint).encode(TEXTS[0])


def test_a_file_without_a_tokenizer_takes_one_that_fits(tmp_path, nano_checkpoint):
    (tmp_path / "tokenizer.json").write_bytes((nano_checkpoint / "tokenizer.json").read_bytes())
    for vocab_size in (8192, 8191):
        gguf_files.write_gguf(tiny.tiny_model("llama", vocab_size=vocab_size), tmp_path / f"{vocab_size}.gguf", lambda name: Type.Q8_0)
    export(tmp_path / "8192.gguf", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").is_file()
    with pytest.raises(ValueError, match="has other tokens than 8191.gguf"):
        export(tmp_path / "8191.gguf", tmp_path / "other")


def test_a_vocabulary_that_takes_forever_is_refused(tmp_path):
    """Of each token of SentencePiece's all ways to cut it in two are tried."""
    from edgeattn.exporters.imports.gguf_tokenizer import write_tokenizer
    settings = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "a" * 100_000], "tokenizer.ggml.scores": [0.0, 0.0]}
    with pytest.raises(ValueError, match="more than 1024 characters"):
        write_tokenizer(tmp_path / "model.gguf", settings, tmp_path)
    assert not list(tmp_path.iterdir())
