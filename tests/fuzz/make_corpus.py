"""Writes the valid checkpoints that fuzzing starts from: one layer, a few thousand weights. What was found lies beside them, in the
repository."""
import tempfile
from pathlib import Path

import gguf_files
import quantised
import tiny
from gguf import GGMLQuantizationType as Type
from importing import CORPUS

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


if __name__ == "__main__":
    write(CORPUS)
