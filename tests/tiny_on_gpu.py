"""A tiny model on the CPU and on a GPU, for tests that compare what they give."""
import numpy as np
import tiny
from safetensors.numpy import save_file

from edgeattn.exporters.export import export
from edgeattn.policies.prefill import seer_attention
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions

SIZES = dict(hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
             max_position_embeddings=1024)
RNG = np.random.default_rng()
DENSE, WHOLE = SparseOptions("off"), PrefillOptions("off")
# Root-mean-square differences of logits, in standard deviations. A last digit of a rounded activation decides, and random weights
# amplify: the CPU's own instruction levels differ by half as much.
CLOSE = {"f16": 0.05, "int8": 0.1, "int4": 0.1}


def make(made):
    """An export of random weights of 4 bits, and SeerAttention's gate."""
    tiny.save_tiny("llama", made / "checkpoint", **SIZES)
    export(made / "checkpoint", made / "out", "int4", 32)
    gate = {"gate_q": RNG.standard_normal((2, 4, 64, 32), np.float32), "gate_k": RNG.standard_normal((2, 2, 192, 32), np.float32) / 10}
    tables = {f"gate_{name}": np.full((SIZES["max_position_embeddings"], 8), x, np.float32) for name, x in (("cos", 0.8), ("sin", 0.6))}
    save_file(gate | tables, made / "out" / seer_attention.FILE)
    return made / "out"


def both(folder, cache, sparse=DENSE, prefill=WHOLE, **more):
    options = dict(ctx_size=768, ubatch=64, threads=1, cache=cache, sparse=sparse, prefill=prefill) | more
    return [Model.load(folder, device=device, **options) for device in ("cpu", "cuda")]


def run(model, prompt, decoded):
    """Logits of the prompt, and of tokens one at a time."""
    a = model.new_sequence()
    return a, model.forward([(a, prompt)], "all"), np.concatenate([model.forward([(a, [token])]) for token in decoded])


def error(got, expected):
    assert got.shape == expected.shape and np.isfinite(got).all()
    return float(np.sqrt(np.square(got - expected).mean(-1)).mean() / expected.std())
