"""edgeattn: an int4 export, 16-bit cache."""
import subprocess
import sys
from pathlib import Path

REQUIRES = {"edgeattn": "edgeattn", "onnx": "onnx", "numpy": "numpy"}


def prepare(checkpoint: Path, folder: Path, config: dict) -> dict:
    """Export the checkpoint if it is not there; what a token reads of it."""
    from onnx_bytes import bytes_per_token
    target = folder / "edgeattn"
    if not target.exists():
        command = [sys.executable, "-m", "edgeattn.apps.cli", "export", str(checkpoint), "-o", str(target), "--precision", "int4"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"the export failed: {done.stdout.strip().splitlines()[-1]}")
    return {"path": str(target), "weight_bytes": bytes_per_token(target / "model.onnx"), "kv_element_bytes": 2,
            "formats": "int4 in blocks of 32 with float16 scales, head int8, cache f16"}


class Engine:
    def __init__(self, path: str, context: int, threads: int):
        import edgeattn
        from edgeattn.cache.options import CacheOptions
        from edgeattn.runtime import Model
        self.model = Model.load(path, cache=CacheOptions("f16", "f16"), ctx_size=context, ubatch=512, threads=threads)
        self.sequence = self.model.new_sequence()
        self.version = f"edgeattn {edgeattn.__version__}"
        self.settings = f"int4, ubatch 512, {threads} threads"

    def forward(self, tokens: list[int]) -> None:
        """Append tokens; the last one's logits are computed."""
        self.model.forward([(self.sequence, tokens)], logit_rows="last")

    def truncate(self, length: int) -> None:
        self.model.truncate(self.sequence, length)

    def memory_parts(self) -> dict[str, int]:
        """Bytes by purpose."""
        return self.model.memory()
