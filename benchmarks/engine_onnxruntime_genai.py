"""onnxruntime-genai: the int4 model of its own builder, default settings, float32 cache (on a GPU float16)."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIRES = {"onnxruntime_genai": "onnxruntime-genai", "onnx": "onnx", "onnx_ir": "onnx_ir", "torch": "torch",
            "transformers": "transformers", "numpy": "numpy"}


def prepare(checkpoint: Path, folder: Path, config: dict, variant: str, device: str = "cpu") -> dict:
    """Build the model if it is not there; what a token reads of it."""
    from onnx_bytes import bytes_per_token
    if device == "cuda":
        import onnxruntime_genai
        if not onnxruntime_genai.is_cuda_available():
            raise RuntimeError("this onnxruntime-genai has no CUDA; install onnxruntime-genai-cuda")
    target, floats = folder / ("onnxruntime_genai" + "_cuda" * (device == "cuda")), "f32" if device == "cpu" else "f16"
    if not target.exists():
        _build(checkpoint, target, device)
    return {"path": str(target), "weight_bytes": bytes_per_token(target / "model.onnx"), "kv_element_bytes": 4 if device == "cpu" else 2,
            "formats": f"int4 in blocks of 32, head as well, scales and cache {floats}"}


def _build(checkpoint, target, device):
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(partial),
               "-p", "int4", "-e", device, "-c", str(target.with_name("builder_cache"))]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai's builder failed: {done.stdout.strip().splitlines()[-1]}")
    partial.rename(target)


class Engine:
    def __init__(self, path: str, context: int, threads: int, variant: str, device: str = "cpu"):
        import numpy as np
        import onnxruntime_genai
        config = onnxruntime_genai.Config(path)
        if device == "cuda":
            config.append_provider("cuda")
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = onnxruntime_genai.Model(config)
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(max_length=context, do_sample=False)
        self.generator, self.as_array = onnxruntime_genai.Generator(self.model, params), np.array
        self.version = f"onnxruntime-genai {onnxruntime_genai.__version__}"
        self.settings = f"int4, intra_op_num_threads {threads}"

    def forward(self, tokens: list[int]) -> None:
        """Append tokens; logits of all of them are computed, as its builder's default graph does."""
        self.generator.append_tokens(self.as_array([tokens], "int32"))

    def truncate(self, length: int) -> None:
        self.generator.rewind_to(length)
