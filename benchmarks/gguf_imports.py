"""What carrying the codes of GGUF files over costs: nano as llama.cpp's quantiser writes it, exported, against llama.cpp itself.

`sh benchmarks/gpu.sh python benchmarks/gguf_imports.py` prints a Markdown table: root mean square error of the logits over a prompt
against the same file dequantised in float32, in standard deviations of the logits. Needs gguf, transformers and llama-cpp-python.
"""
import json
import tempfile
from pathlib import Path

import gguf_files
import llama_cpp
import numpy as np
import transformers
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer

from edgeattn.exporters import check, export as exports
from edgeattn.exporters.checkpoint import open_checkpoint
from edgeattn.exporters.families import read_architecture
from edgeattn.exporters.forward import forward
from edgeattn.exporters.interpret import interpret

NANO = Path(__file__).parent.parent / "models/nano"
KINDS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "TQ2_0", "TQ1_0")
PROMPT = ("The keeper of the lighthouse climbed the stairs each evening to light the lamp, and counted the ships that passed. In winter "
          "nobody came, and he wrote letters to his sister.")


def write_f16(path: Path) -> None:
    vocabulary = gguf_files.nano_vocabulary(json.loads((NANO / "tokenizer.json").read_text()), "smollm", "")
    gguf_files.write_gguf(transformers.AutoModelForCausalLM.from_pretrained(NANO), path, lambda name: Type.F16, vocabulary)


def quantise(source: Path, target: Path, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise RuntimeError(f"llama.cpp could not write {kind}")


def dequantised(path: Path, tokens: np.ndarray) -> np.ndarray:
    source = open_checkpoint(path)
    *_, (_, logits) = forward(source, read_architecture(source), tokens)
    return logits


def peer(path: Path, tokens: np.ndarray) -> np.ndarray:
    model = llama_cpp.Llama(str(path), n_ctx=64, n_batch=64, logits_all=True, verbose=False)
    model.eval(tokens.tolist())
    return np.array(model.scores[:len(tokens)], np.float32)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(got - expected).mean()) / expected.std())


def main() -> None:
    exports.check = lambda *_: {}  # what it would measure is measured here
    tokens = np.array(Tokenizer.from_file(str(NANO / "tokenizer.json")).encode(PROMPT).ids)
    print(f"{len(tokens)} tokens\n")
    print("| file | stored weights, exact arithmetic | edgeattn | llama.cpp | what the file itself lost of float16 |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_f16(folder / "f16.gguf")
        original = dequantised(folder / "f16.gguf", tokens)
        for kind in KINDS:
            path, out = folder / f"{kind}.gguf", folder / kind
            quantise(folder / "f16.gguf", path, kind)
            expected, report = dequantised(path, tokens), exports.export(path, out)
            exact = interpret(out, check._feeds(report["model"], tokens), ["logits"])["logits"]
            figures = [error(got, expected) for got in (exact, check._runtime_logits(out, tokens), peer(path, tokens))]
            print(f"| {kind} | {figures[0]:.4f} | {figures[1]:.4f} | {figures[2]:.4f} | {error(expected, original):.3f} |", flush=True)


if __name__ == "__main__":
    main()
