"""The checkpoint's logits by transformers, for small models where it is installed.

Run as a program, with folder and token ids as arguments, it writes the logits to stdout as .npy: `check` does so unless torch is
loaded already, because a child process gives torch's 400 MB back and keeps its thread pool away from ours. -P:
modules are not looked for in the current folder, which may be a checkpoint's.
"""
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np


def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray | None:
    """tokens [n] int64 -> logits [n, vocab] float32; None when torch or transformers cannot run here."""
    if "torch" in sys.modules:
        return _run(folder, tokens)
    command = [sys.executable, "-P", "-m", __name__, str(folder), json.dumps(tokens.tolist())]
    done = subprocess.run(command, capture_output=True, check=False)
    return np.load(io.BytesIO(done.stdout), allow_pickle=False) if done.returncode == 0 else None


def _run(folder, tokens):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True,
                                                 trust_remote_code=False)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits[0].numpy()


if __name__ == "__main__":
    np.save(sys.stdout.buffer, _run(Path(sys.argv[1]), np.array(json.loads(sys.argv[2]), np.int64)))
