"""Write a Hugging Face folder of a named shape with random weights: `python random_checkpoint.py llama-3.2-1b FOLDER`.

Speed does not depend on the values, so no download is needed. Weights are float16 with a spread of 0.02, norms near one; ternary
weights are packed, -1, 0 and 1 equally often. Needs only numpy and streams: memory stays near 20 MB. The tokenizer has the right
number of entries and no merges: it opens in `tokenizers` and transformers, and turns text into one token per byte.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

POOL = 4194301  # a prime: a row's length never divides it, so no two rows start alike
STANDARD = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "float16", "use_cache": True, "attention_dropout": 0.0,
            "initializer_range": 0.02, "tie_word_embeddings": True}
SHAPES = {
    "llama-3.2-1b": STANDARD | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048,
        "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1,
        "bos_token_id": 128000, "eos_token_id": 128001,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192}},
    "qwen2.5-0.5b": STANDARD | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 24, "hidden_size": 896,
        "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "sliding_window": 32768,
        "max_window_layers": 24, "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151645},
}
SHAPES["bitnet-2b"] = STANDARD | {
    "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "num_hidden_layers": 30, "hidden_size": 2560, "intermediate_size": 6912,
    "num_attention_heads": 20, "num_key_value_heads": 5, "vocab_size": 128256, "max_position_embeddings": 4096, "rope_theta": 500000.0,
    "hidden_act": "relu2", "attention_bias": False, "bos_token_id": 128000, "eos_token_id": 128001,
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}}
SHAPES["llama-tiny"] = SHAPES["llama-3.2-1b"] | {  # to try a benchmark out
    "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1,
    "vocab_size": 1024, "bos_token_id": 1000, "eos_token_id": 1001}
SHAPES["bitnet-tiny"] = SHAPES["bitnet-2b"] | {
    "num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1,
    "vocab_size": 1024, "bos_token_id": 1000, "eos_token_id": 1001}
TERNARY_BYTES = np.array([a | b << 2 | c << 4 | d << 6 for a in range(3) for b in range(3) for c in range(3) for d in range(3)], np.uint8)


def tensor_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint: name -> shape. Matrices that have a weight_scale beside them are ternary, four rows a byte."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    rows = {"self_attn.q_proj": config["num_attention_heads"] * head_dim, "self_attn.k_proj": config["num_key_value_heads"] * head_dim,
            "self_attn.v_proj": config["num_key_value_heads"] * head_dim, "mlp.gate_proj": ffn, "mlp.up_proj": ffn}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, n in rows.items():
            shapes[f"{prefix}{name}.weight"] = (n, hidden)
            if config["model_type"] == "qwen2" and "self_attn" in name:
                shapes[f"{prefix}{name}.bias"] = (n,)
        shapes[prefix + "self_attn.o_proj.weight"] = (hidden, rows["self_attn.q_proj"])
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
        shapes[prefix + "input_layernorm.weight"] = shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        if config["model_type"] == "bitnet":
            shapes[prefix + "self_attn.attn_sub_norm.weight"], shapes[prefix + "mlp.ffn_sub_norm.weight"] = (hidden,), (ffn,)
            for name in [name for name in shapes if name.startswith(prefix) and name.endswith("_proj.weight")]:
                shapes[name], shapes[f"{name}_scale"] = (shapes[name][0] // 4, shapes[name][1]), (1,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return shapes


def write_safetensors(path: Path, shapes: dict, seed: int = 0) -> None:
    """Random float16 tensors, cut at random places from one pool of normal numbers, and ternary ones from one of bytes."""
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(POOL, np.float32)
    weights, norms, packed = (0.02 * pool).astype(np.float16), (1 + 0.1 * pool).astype(np.float16), rng.choice(TERNARY_BYTES, POOL)

    def pool_of(name):
        return norms if "norm" in name or name.endswith("_scale") else packed if f"{name}_scale" in shapes else weights
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        kind = pool_of(name).dtype
        start, end = end, end + kind.itemsize * int(np.prod(shape))
        header[name] = {"dtype": {"float16": "F16", "uint8": "U8"}[kind.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            _write_cut(file, pool_of(name), int(np.prod(shape)), int(rng.integers(POOL)))


def _write_cut(file, pool, count, start):
    while count:
        piece = pool[start:start + count]
        piece.tofile(file)
        count, start = count - piece.size, 0


def write_tokenizer(folder: Path, config: dict) -> None:
    """A byte-level BPE tokenizer with as many entries as the vocabulary has, and no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's table from bytes to characters
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    vocab = {text: i for i, text in enumerate(letters)} | {f"<|{i}|>": i for i in range(256, config["vocab_size"])}
    special = [{"id": i, "content": f"<|{i}|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for i in (config["bos_token_id"], config["eos_token_id"])]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
                 "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
                 "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                           "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": special[0]["content"], "eos_token": special[1]["content"]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"], **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def write_checkpoint(shape: str, folder: Path, seed: int = 0) -> Path:
    """The folder, written unless it is already there."""
    folder = Path(folder)
    if folder.exists():
        return folder
    partial, config = folder.with_name(folder.name + ".partial"), SHAPES[shape]
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_safetensors(partial / "model.safetensors", tensor_shapes(config), seed)
    write_tokenizer(partial, config)
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    ends = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    (partial / "generation_config.json").write_text(json.dumps(ends, indent=1))
    partial.rename(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists():
        print(f"{args.folder} exists already: name a new folder or remove it", file=sys.stderr)
        return 2
    print(write_checkpoint(args.shape, args.folder, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
