"""BitNet b1.58 checkpoints (arXiv 2402.17764) as transformers writes them: quant_method "bitnet".

A linear layer [N, K] of N a multiple of four is either packed,
    weight        [N / 4, K]  uint8   four outputs a byte: bits 2 i and 2 i + 1 of row r hold output i * N / 4 + r, as w + 1
    weight_scale  [1]         float   multiplied with the product (linear_class "autobitlinear"), or divided by ("bitlinear")
or, with quantization_mode "online", master weights [N, K] in floats, which mean -1, 0 and 1 times their mean magnitude.
Biases are floats; beside multiplied weights they are refused, because transformers scales them too, as no training does. The input of
every such layer is rounded to int8, token by token. Embedding and head are floats.

`activation_bits` 4 is our own key, for BitNet a4.8 (arXiv 2411.04965), of which no checkpoint is public: the inputs of q, k, v, gate
and up are then rounded to int4, and the smaller half of o's is dropped.
"""
import numpy as np

from edgeattn.exporters.checkpoint import Ternary, Weight
from edgeattn.exporters.stored import FLOATS

PRECISION = "ternary"                                  # of exports
CLASSES = {"autobitlinear": False, "bitlinear": True}  # whether weight_scale divides
MODES = ("offline", "online")
ACTIVATION_BITS = (4, 8)
FULL = ("o_proj", "down_proj")                         # the layers that take int8 at activation_bits 4 too
FLOAT_LAYERS = ("lm_head", "model.embed_tokens")
SLAB_BYTES = 4 << 20                                   # of float32 masters in work at a time


def check(about: dict) -> None:
    for key, default, known in (("linear_class", "bitlinear", CLASSES), ("quantization_mode", "offline", MODES),
                                ("activation_bits", 8, ACTIVATION_BITS)):
        if about.get(key, default) not in known:
            raise ValueError(f"{key} {about[key]!r} cannot be read; supported: {list(known)}")
    if about.get("use_rms_norm"):
        raise ValueError("use_rms_norm (a norm inside every linear layer) is not supported")
    if other := set(about.get("modules_to_not_convert") or ()) - set(FLOAT_LAYERS):
        raise ValueError(f"modules_to_not_convert {sorted(other)} is not supported; only {list(FLOAT_LAYERS)} may stay floats")
    if about.get("quantization_mode") == "online" and about.get("linear_class") != "autobitlinear":
        raise ValueError('quantization_mode "online" needs linear_class "autobitlinear"')


def read_weight(checkpoint, name, shape):
    if name in FLOAT_LAYERS:
        return None
    about = checkpoint.config["quantization_config"]
    read = _masters if about.get("quantization_mode") == "online" else _packed
    codes, scale = read(checkpoint, name, shape, about)
    bits = 8 if name.endswith(FULL) else about.get("activation_bits", 8)
    ternary = Ternary(codes, np.full(shape[0], scale, np.float32), bits)
    return Weight(shape, lambda start, stop: codes(start, stop) * scale, ternary=ternary)


def _packed(checkpoint, name, shape, about):
    n, k = shape
    if n % 4:
        raise ValueError(f"{checkpoint.folder}: {name!r} has {n} outputs; packed ternary weights come in fours")
    divides = CLASSES[about.get("linear_class", "bitlinear")]
    if f"{name}.bias" in checkpoint.tensors and not divides:
        raise ValueError(f"{checkpoint.folder}: {name!r} has a bias, which not all who read such checkpoints scale alike; not supported")
    weight, quarter = checkpoint.find(f"{name}.weight", (n // 4, k), ("U8",)), n // 4
    scale = checkpoint.find(f"{name}.weight_scale", (1,), FLOATS).read(0, 1)[0]
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"{weight.path}: {name!r} has a weight_scale of {scale}; the file is damaged")

    def codes(start, stop):
        parts = []
        for i in range(4):
            first, last = max(start - i * quarter, 0), min(stop - i * quarter, quarter)
            if first < last:
                stored = weight.integers(first * k, last * k).reshape(-1, k)
                parts.append((stored >> np.uint8(2 * i) & np.uint8(3)).astype(np.int8) - np.int8(1))
        out = np.concatenate(parts) if parts else np.empty((0, k), np.int8)
        if (out > 1).any():
            raise ValueError(f"{weight.path}: {name!r} holds codes that are none of a ternary weight; the file is damaged")
        return out
    return codes, np.float32(1) / scale if divides else np.float32(scale)


def _masters(checkpoint, name, shape, about):
    (n, k), weight = shape, checkpoint.find(f"{name}.weight", shape, FLOATS)
    step = max(SLAB_BYTES // (4 * k), 1)
    total = sum(np.abs(weight.read(start * k, min(start + step, n) * k), dtype=np.float64).sum() for start in range(0, n, step))
    factor = np.float32(1) / max(np.float32(total / (n * k)), np.float32(1e-5))

    def codes(start, stop):
        stored = weight.read(start * k, stop * k).reshape(-1, k)
        return np.clip(np.rint(stored * factor), -1, 1).astype(np.int8)
    return codes, _rounded(np.float32(1) / factor, weight.dtype)


def _rounded(x, dtype):
    """A float32 in the precision of the checkpoint, as which its layers hold the weights."""
    if dtype == "BF16":
        bits = np.float32(x).view(np.uint32)
        return (bits + np.uint32(0x7fff) + (bits >> np.uint32(16) & np.uint32(1)) & np.uint32(0xffff0000)).view(np.float32)
    return np.float32(np.float16(x)) if dtype == "F16" else np.float32(x)
