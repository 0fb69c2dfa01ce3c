"""edgeattn: an int4 export.

The variant is the type of its cache, f16 by default, and what decode steps read, everything by default: "int4", "int4+auto". Prompts are
read by "auto" with the latter, otherwise whole.
"""
import subprocess
import sys
from pathlib import Path

REQUIRES = {"edgeattn": "edgeattn", "onnx": "onnx", "numpy": "numpy"}


def prepare(checkpoint: Path, folder: Path, config: dict, variant: str, device: str = "cpu") -> dict:
    """Export the checkpoint if it is not there; what a token reads of it."""
    from edgeattn.page_formats import PAGE, PageFormat
    from edgeattn.devices import make_backend
    from onnx_bytes import bytes_per_token
    make_backend(device)  # says what is missing
    target = folder / "edgeattn"
    if not target.exists():
        command = [sys.executable, "-m", "edgeattn.apps.cli", "export", str(checkpoint), "-o", str(target), "--precision", "int4"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"the export failed: {done.stdout.strip().splitlines()[-1]}")
    kind, sparse = parts(variant)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {"path": str(target), "weight_bytes": bytes_per_token(target / "model.onnx"),
            "kv_element_bytes": PageFormat(head_dim, kind, kind).page_bytes / (2 * PAGE * head_dim),
            "formats": f"int4 in blocks of 32 with float16 scales, head int8, cache {kind}, sparse attention {sparse}"}


def parts(variant: str) -> tuple[str, str]:
    """(type of the cache, method of sparse attention)."""
    kind, _, sparse = variant.partition("+")
    return kind or "f16", sparse or "off"


class Engine:
    def __init__(self, path: str, context: int, threads: int, variant: str, device: str = "cpu"):
        import edgeattn
        from edgeattn.cache.options import CacheOptions
        from edgeattn.prefill_scheduler import PrefillOptions
        from edgeattn.runtime import Model
        from edgeattn.scheduler import SparseOptions
        kind, sparse = parts(variant)
        self.model = Model.load(path, cache=CacheOptions(kind, kind), ctx_size=context, ubatch=512, threads=threads, device=device,
                                sparse=SparseOptions(sparse), prefill=PrefillOptions("auto" if sparse == "auto" else "off"))
        self.sequence = self.model.new_sequence()
        self.version = f"edgeattn {edgeattn.__version__}"
        self.settings = f"int4, ubatch 512, {f'{threads} threads' if device == 'cpu' else device}"

    def forward(self, tokens: list[int]) -> None:
        """Append tokens; the last one's logits are computed."""
        self.model.forward([(self.sequence, tokens)], logit_rows="last")

    def truncate(self, length: int) -> None:
        self.model.truncate(self.sequence, length)

    def fill(self, length: int) -> None:
        """Hold `length` tokens, whole pages of random ones: no method's figure gains by them, for nothing is chosen twice."""
        import numpy as np
        from edgeattn.attention_case import fill, random_source
        self.model.truncate(self.sequence, 0)
        cache = self.model.cache
        fill(cache, self.sequence, length, random_source(np.random.default_rng(0), cache.head_dim, cache.pools[0].format.width))

    def reads(self) -> float:
        """Part of the pairs that attention read of prompts, sparse chunks alone, since the last time that this was asked."""
        return self.model.prefill.figures()["read"] or 1.0 if self.model.prefill else 1.0

    def memory_parts(self) -> dict[str, int]:
        """Bytes by purpose."""
        return self.model.memory()
