"""A Llama or Qwen2 folder to GGUF in llama.cpp's own Q4_0: float16 with the `gguf` package, then llama.cpp's quantiser.

`python gguf_checkpoint.py FOLDER FILE.gguf`. The file has no vocabulary (`no_vocab`): it is for timing. What the quantiser
chooses is kept: a tied embedding, which is the head as well, becomes Q6_K. Needs gguf and llama-cpp-python.
"""
import json
import math
import sys
from pathlib import Path

import numpy as np

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
         "post_attention_layernorm": "ffn_norm"}
TOP = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    if name in TOP:
        return TOP[name]
    _, _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(module)]}.{kind}"


def read_safetensors(path: Path):
    """(name, array mapped from the file) of each tensor; float16 and float32 files only."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", 8 + size)
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            yield name, data[start:end].view({"F16": np.float16, "F32": np.float32}[entry["dtype"]]).reshape(entry["shape"])


def interleave_rotary(weight, heads):
    """Rows of each head from halves (Hugging Face) to pairs (GGUF's llama)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rope_factors(config: dict, head_dim: int):
    """Llama 3's rope scaling as what each frequency is divided by, float32 [head_dim / 2]; None without it."""
    scaling = config.get("rope_scaling")
    if not scaling or scaling.get("rope_type") != "llama3":
        return None
    low, high, context = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["original_max_position_embeddings"]
    turns = context * config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def write_f16(folder: Path, path: Path) -> None:
    import gguf
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    writer = gguf.GGUFWriter(path, config["model_type"])
    _add_settings(writer, config, head_dim)
    factors = rope_factors(config, head_dim)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, array in read_safetensors(folder / "model.safetensors"):
        if config["model_type"] == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave_rotary(array, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(gguf_name(name), array.astype(np.float32) if array.ndim == 1 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_settings(writer, config, head_dim):
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(1)  # mostly float16
    writer.add_tokenizer_model("no_vocab")


def quantise(source: Path, target: Path, threads: int = 2) -> None:
    import llama_cpp
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp could not quantise {source}")


def tensor_types(path: Path) -> dict[str, tuple[str, int]]:
    """name -> (type, bytes) of every tensor of a GGUF file."""
    import gguf
    return {tensor.name: (tensor.tensor_type.name, int(tensor.n_bytes)) for tensor in gguf.GGUFReader(path).tensors}


def write_q4_0(folder: Path, path: Path) -> Path:
    """The GGUF file, written unless it is already there."""
    if not path.exists():
        half, partial = path.with_suffix(".f16"), path.with_suffix(".partial")
        write_f16(folder, half)
        quantise(half, partial)
        half.unlink()
        partial.rename(path)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python gguf_checkpoint.py FOLDER FILE.gguf")
    print(write_q4_0(Path(sys.argv[1]), Path(sys.argv[2])))
