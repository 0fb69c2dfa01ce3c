"""transformers: the checkpoint as it is, nothing quantised, eager, with its scaled-dot-product attention and growing cache.

The variant is the type of weights and cache: bfloat16 (the default), float16 or float32.
"""
import json
from pathlib import Path

REQUIRES = {"transformers": "transformers", "torch": "torch", "numpy": "numpy"}
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def prepare(checkpoint: Path, folder: Path, config: dict, variant: str, device: str = "cpu") -> dict:
    """What a token reads of the checkpoint; nothing is made."""
    variant = variant or "bfloat16"
    if variant not in BYTES:
        raise ValueError(f"a variant of transformers is one of {', '.join(BYTES)}, got {variant!r}")
    if device == "cuda":
        import torch
        if not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no CUDA device; install a CUDA build of torch")
    return {"path": str(checkpoint), "weight_bytes": BYTES[variant] * _numbers(checkpoint, config), "kv_element_bytes": BYTES[variant],
            "formats": f"{variant} weights and head, cache {variant}"}


def _numbers(checkpoint, config):
    """Of weights that a token reads: an embedding that is not the head as well is only looked up."""
    found = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with open(file, "rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        for name, about in header.items():
            if name != "__metadata__" and (config.get("tie_word_embeddings") or "embed_tokens" not in name):
                count = 1
                for size in about["shape"]:
                    count *= size
                found += count
    return found


class Engine:
    def __init__(self, path: str, context: int, threads: int, variant: str, device: str = "cpu"):
        import torch
        import transformers
        torch.set_num_threads(threads)
        self.torch, self.device = torch, device
        kind = getattr(torch, variant or "bfloat16")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=kind, local_files_only=True).to(device).eval()
        self.cache = transformers.DynamicCache(config=self.model.config)
        self.version = f"transformers {transformers.__version__}, torch {torch.__version__}"
        self.settings = f"{self.model.config._attn_implementation} attention, {threads} threads" if device == "cpu" else \
            f"{self.model.config._attn_implementation} attention, {torch.cuda.get_device_name()}"

    def forward(self, tokens: list[int]) -> None:
        """Append tokens; the last one's logits are computed."""
        with self.torch.inference_mode():
            ids = self.torch.tensor([tokens], device=self.device)
            logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
            self.last = logits[0, -1].float().cpu()  # waits for a GPU

    def truncate(self, length: int) -> None:
        self.cache.crop(length - self.cache.get_seq_length())  # how many fewer: other numbers mean other things in some versions
