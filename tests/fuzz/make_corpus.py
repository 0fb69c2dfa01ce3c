"""Writes what is valid and fuzzing starts from: one layer, a few thousand weights. What was found lies beside it, in the repository."""
import json
import tempfile
from pathlib import Path

import gguf_files
import quantised
import tiny
from gguf import GGMLQuantizationType as Type
from importing import CORPUS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SMALL = dict(vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
             head_dim=16, max_position_embeddings=64)
FOLDERS = {
    "gptq": [dict(bits=2, group=16, act_order=True), dict(bits=3, group=32), dict(bits=4, group=16, symmetric=True),
             dict(bits=8, group=-1)],
    "awq": [dict(group=16), dict(group=32)],
    "hqq": [dict(bits=bits, group=16, axis=axis) for bits, axis in ((8, 1), (4, 1), (3, 1), (2, 0), (1, 1))],
}
# Rows of 256, which most blocks need, but few of them; what is narrower gets one of two other types.
FILES = [("llama", "Q4_0", "Q4_K"), ("llama", "Q8_0", "Q6_K"), ("qwen2", "Q4_1", "Q5_K"), ("qwen3", "Q5_0", "Q3_K"),
         ("llama_bias", "Q5_1", "Q2_K"), ("llama", "F16", "TQ1_0"), ("llama3_rope", "BF16", "TQ2_0")]


def write(corpus: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for loader, cases in FOLDERS.items():
            (corpus / loader).mkdir(parents=True, exist_ok=True)
            for i, options in enumerate(cases):
                tiny.save_tiny("llama", folder, **SMALL)
                quantised.quantise_folder(folder, getattr(quantised, loader), **options)
                blob = (folder / "config.json").read_bytes() + b"\0" + (folder / "model.safetensors").read_bytes()
                (corpus / loader / f"valid{i}").write_bytes(blob)
        (corpus / "gguf").mkdir(parents=True, exist_ok=True)
        for i, (case, narrow, wide) in enumerate(FILES):
            model = tiny.tiny_model(case, **SMALL | dict(hidden_size=256, num_attention_heads=1, num_key_value_heads=1, head_dim=32))

            def kind_of(name):
                return Type[wide if "o_proj" not in name and "down" not in name else narrow]
            gguf_files.write_gguf(model, corpus / "gguf" / f"valid{i}", kind_of, gguf_files.small_vocabulary if i % 2 else None)


# ---- what the runtime loads ----------------------------------------------------------------------------------------
EXPORTS = [("llama", "int4", False), ("qwen3", "fp32", False), ("llama_bias", "int3", False), ("bitnet", "fp16", False),
           ("llama", "int4", True)]  # the last: weights of GPTQ in act-order
TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] | upper }}: {{ m.content | trim }}{% if loop.last %}\n{% endif %}" \
    "{% endfor %}"


def write_loaded(corpus: Path) -> None:
    """Exports, sessions of the first of them, tokenizers."""
    from edgeattn.cache import session
    from edgeattn.exporters.export import export
    from edgeattn.generation import Sampler, SamplerOptions
    from edgeattn.runtime import Model
    from loading import CACHES, DENSE, PARTS, join
    for kind in ("export", "session", "tokenizer"):
        (corpus / kind).mkdir(parents=True, exist_ok=True)
    for i, (case, precision, act_order) in enumerate(EXPORTS):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            tiny.save_tiny(case, folder / "checkpoint", **SMALL)
            if act_order:
                quantised.quantise_folder(folder / "checkpoint", quantised.gptq, group=16, act_order=True)
            export(folder / "checkpoint", folder / "export", precision=precision)
            (corpus / "export" / f"valid{i}").write_bytes(join((folder / "export" / name).read_bytes() for name in PARTS["export"]))
            for j, cache in enumerate(CACHES if i == 0 else ()):
                model = Model(folder / "export", cache=cache, **DENSE)
                ids, sequence = [k % 16 for k in range(50)], model.new_sequence()
                model.forward([(sequence, ids)])
                meta = {"messages": [{"role": "user", "content": "a"}], "sampler": Sampler(SamplerOptions(seed=1)).state, "dropped": 0}
                session.save(corpus / "session" / f"valid{j}", model.cache, sequence, ids, model.config, meta)
    for i, (backend, about) in enumerate(_tokenizers()):
        parts = backend.to_str().encode(), json.dumps(about).encode(), TEMPLATE.encode()
        (corpus / "tokenizer" / f"valid{i}").write_bytes(join(parts))


def _tokenizers():
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(letters | {"ll": 256}, [("l", "l")]))
    bytes_.normalizer = normalizers.NFC()
    bytes_.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{L}+|\s+"), "isolated"),
                                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens([AddedToken("<s>", special=True)])
    yield bytes_, {"bos_token": "<s>", "eos_token": {"content": "<s>"}}
    pieces = {token: i for i, token in enumerate(["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"helowrd", "he"])}
    piece = Tokenizer(models.BPE(pieces, [("h", "e")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    piece.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    piece.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    piece.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    yield piece, {"bos_token": "<s>", "chat_template": [{"name": "default", "template": TEMPLATE}]}
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "hello": 1, "##a": 2, "a": 3}, unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.decoder = decoders.WordPiece()
    yield words, {}


if __name__ == "__main__":
    write(CORPUS)
    write_loaded(CORPUS)
