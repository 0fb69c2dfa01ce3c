"""A GGUF file of BitNet-2B's shape with random TQ2_0 weights, for timing llama.cpp: `python gguf_ternary.py FILE.gguf`.

llama.cpp's `llama` architecture: SwiGLU in place of squared ReLU, and no norms before o and down; its matrices are the same. The
tied embedding is Q6_K, which is what llama.cpp's own quantiser makes of it. Needs gguf and numpy; no vocabulary.
"""
import sys
from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 30, 2560, 6912, 20, 5, 128, 128256
BLOCK = 256  # weights of a block of TQ2_0 (66 bytes) and Q6_K (210 bytes)


def blocks(rng, rows, columns, kind):
    """Random weights as a GGUF row of bytes: codes, then float16 scales."""
    size, code_bytes = {"TQ2_0": (66, 64), "Q6_K": (210, 208)}[kind]
    out = np.empty((rows * columns // BLOCK, size), np.uint8)
    out[:, :code_bytes] = rng.integers(0, 256, (1 << 16, code_bytes), np.uint8)[rng.integers(0, 1 << 16, len(out))]
    if kind == "TQ2_0":  # digits 0, 1, 2: the fourth pattern is no code
        out[:, :code_bytes] &= ~(out[:, :code_bytes] >> 1 & 0x55)
    out[:, code_bytes:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return out.reshape(rows, -1)


def write(path: Path) -> None:
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_TQ2_0)
    writer.add_tokenizer_model("no_vocab")

    def add(name, rows, columns, kind="TQ2_0"):
        writer.add_tensor(name, blocks(rng, rows, columns, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    add("token_embd.weight", VOCAB, HIDDEN, "Q6_K")
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for i in range(LAYERS):
        for name, rows, columns in (("attn_q", HEADS * HEAD_DIM, HIDDEN), ("attn_k", KV_HEADS * HEAD_DIM, HIDDEN),
                                    ("attn_v", KV_HEADS * HEAD_DIM, HIDDEN), ("attn_output", HIDDEN, HIDDEN), ("ffn_gate", FFN, HIDDEN),
                                    ("ffn_up", FFN, HIDDEN), ("ffn_down", HIDDEN, FFN)):
            add(f"blk.{i}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python gguf_ternary.py FILE.gguf")
    write(Path(sys.argv[1]))
