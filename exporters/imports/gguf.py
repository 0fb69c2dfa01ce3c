"""A GGUF file as a checkpoint: its settings as a Hugging Face config, its tensors by their Hugging Face names.

Architectures llama (Llama, Mistral, SmolLM ...), qwen2 and qwen3. What llama.cpp's converter does to the weights is undone: in
llama, the rows of each head of q and k are paired as (0, half), (1, half + 1) ...
"""
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np

from edgeattn.exporters.checkpoint import Weight
from edgeattn.exporters.imports.gguf_blocks import OTHERS, TYPES, Codes
from edgeattn.exporters.imports.gguf_file import read_gguf
from edgeattn.exporters.imports.gguf_tokenizer import check_tokenizer, write_tokenizer
from edgeattn.exporters.imports.packing import grouped
from edgeattn.exporters.stored import as_float, read_bytes
from edgeattn.folder import inside

ARCHITECTURES = ("llama", "qwen2", "qwen3")
SIZES = {"hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
         "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
         "max_position_embeddings": "context_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


class GGUF:
    """What `Checkpoint` is for a folder, for one file."""
    quantised_by = "gguf"

    def __init__(self, path: str | Path):
        self.folder = self.described_by = Path(path)
        self.settings, self.tensors = read_gguf(self.folder, TYPES, OTHERS)
        if self.settings.get("split.count", 1) != 1:
            raise ValueError(f"{path}: is one of several parts; join them first: llama-gguf-split --merge {self.folder.name} whole.gguf")
        self.config = self._config()

    @property
    def config_sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def weight(self, name: str, shape: tuple[int, int]) -> Weight:
        """Matrix `name` [shape], read on demand."""
        entry, rows = self._find(name, shape), self._rows(name, shape[0])
        width, size = shape[1], entry.row_bytes

        def stored(start, stop):
            return read_bytes(self.folder, entry.offset + start * size, (stop - start) * size)

        def floats(start, stop):
            return as_float(stored(start, stop), entry.type.name).reshape(-1, width)

        def codes(start, stop):
            try:
                found = entry.type.decode(stored(start, stop).reshape(-1, entry.type.bytes))
            except ValueError as error:
                raise ValueError(f"{self.folder}: {error}") from None
            return tuple(None if x is None else x.reshape(stop - start, -1) for x in found)
        if not isinstance(entry.type, Codes):
            return Weight(shape, lambda start, stop: _pick(floats, rows, start, stop))
        return grouped(shape, entry.type.bits, entry.type.group, lambda start, stop: _pick(codes, rows, start, stop), entry.type.name)

    def vector(self, name: str, size: int) -> np.ndarray:
        """Vector `name` [size] float32."""
        entry, rows = self._find(name, (size,)), self._rows(name, size)
        if isinstance(entry.type, Codes):
            raise ValueError(f"{self.folder}: {name!r} is stored as {entry.type.name}, which vectors are not; the file is damaged")
        values = as_float(read_bytes(self.folder, entry.offset, size * entry.type.bytes), entry.type.name)
        return values if rows is None else values[rows]

    def read_json(self, name: str) -> dict:
        return {}

    def copy_files(self, names: tuple[str, ...], folder: Path) -> None:
        """The tokenizer's files: made from the settings, or, where those have none that is known here, those beside the GGUF file. What
        lies beside a file that needs nothing is left alone: it may be another model's."""
        beside = self.folder.parent
        theirs = inside(beside, "tokenizer.json").is_file()
        try:
            found = write_tokenizer(self.folder, self.settings, folder)
        except ValueError:
            if not theirs:
                raise
            found = False
        if theirs and not found:
            check_tokenizer(beside / "tokenizer.json", self.folder, self.settings, self.config["vocab_size"])
            for name in names:
                if inside(beside, name).is_file():
                    shutil.copyfile(beside / name, folder / name)

    def _config(self):
        kind, settings = self.settings.get("general.architecture"), self.settings
        if kind not in ARCHITECTURES:
            raise ValueError(f"{self.folder}: GGUF architecture {str(kind)[:40]!r} cannot be read; supported: {list(ARCHITECTURES)}")
        about = {name.removeprefix(f"{kind}."): value for name, value in settings.items() if name.startswith(f"{kind}.")}
        if about.get("expert_count"):
            raise ValueError(f"{self.folder}: a mixture of experts cannot be read")
        config = {name: about[key] for name, key in SIZES.items() if key in about}
        arrays = [name for name, value in config.items() if isinstance(value, (np.ndarray, list, str))]
        if arrays:
            raise ValueError(f"{self.folder}: {SIZES[arrays[0]]} is not one number for all layers, which is not supported")
        embedding = self.tensors.get("token_embd.weight")
        config |= {"model_type": kind, "_name_or_path": str(settings.get("general.name", "")),
                   "vocab_size": embedding.shape[0] if embedding else 0,
                   "tie_word_embeddings": "output.weight" not in self.tensors, "attention_bias": "blk.0.attn_q.bias" in self.tensors,
                   "mlp_bias": "blk.0.ffn_gate.bias" in self.tensors, "rope_parameters": self._rope(about),
                   "bos_token_id": settings.get("tokenizer.ggml.bos_token_id"), "eos_token_id": self._ends()}
        config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
        if "attention.key_length" in about:
            config["head_dim"] = about["attention.key_length"]
        width = config.get("head_dim") or config.get("hidden_size", 0) // max(config.get("num_attention_heads", 1), 1)
        if about.get("rope.dimension_count", width) != width or about.get("attention.value_length", width) != width:
            raise ValueError(f"{self.folder}: heads of {width} that are rotated in part, or whose values are of another size, are not "
                             "supported")
        return config

    def _rope(self, about):
        rope = {"rope_type": about.get("rope.scaling.type", "default"), "rope_theta": about.get("rope.freq_base", 10000.0)}
        if rope["rope_type"] == "none":
            rope["rope_type"] = "default"
        if "rope.scaling.factor" in about:
            rope["factor"] = about["rope.scaling.factor"]
        if "rope_freqs.weight" in self.tensors:  # Llama 3's scaling, as what each frequency is divided by
            size = self.tensors["rope_freqs.weight"].shape[-1]
            rope |= {"rope_type": "divided", "divisors": self.vector("rope_freqs.weight", size).tolist()}
        return rope

    def _ends(self):
        found = [self.settings.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        return list(dict.fromkeys(int(token) for token in found if isinstance(token, int)))

    def _find(self, name, shape):
        entry = self.tensors.get(_gguf_name(name))
        if entry is None:
            raise ValueError(f"{self.folder}: tensor {_gguf_name(name)!r} is missing; the file is incomplete or of another architecture")
        if entry.shape != tuple(shape):
            raise ValueError(f"{self.folder}: {_gguf_name(name)!r} has shape {list(entry.shape)}, the file's settings ask for "
                             f"{list(shape)}")
        return entry

    def _rows(self, name, n):
        """Which of the file's rows are rows 0 ... n of the weight; None for the same ones."""
        if self.settings["general.architecture"] != "llama" or not re.search(r"\.self_attn\.[qk]_proj\.", name):
            return None
        heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        return np.arange(n).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _pick(read, rows, start, stop):
    """What read gives for these rows of the file, in the order of `rows`: those of a head lie together."""
    if rows is None:
        return read(start, stop)
    wanted = rows[start:stop]
    first, last = int(wanted.min()), int(wanted.max()) + 1
    found = read(first, last)
    return found[wanted - first] if isinstance(found, np.ndarray) else tuple(x if x is None else x[wanted - first] for x in found)


def _gguf_name(name):
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    module, _, kind = name.rpartition(".")
    if module in TOP:
        return f"{TOP[module]}.{kind}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{found[1]}.{PARTS.get(found[2], found[2])}.{kind}" if found else name
