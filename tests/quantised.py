"""Writers of quantised checkpoints, from the definitions of their formats, beside the weights that they stand for.

Each `pack` takes codes, scales and zero points of a linear layer and gives the tensors of that layer; none shares code with the
importers. `quantise_folder` does a whole checkpoint and returns the model with those weights.
"""
import json
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def stream(codes, bits):
    """[n, width] codes as int32 [n * bits / 32, width]: each column one long number, the first code in its lowest bits."""
    columns = []
    for column in codes.T:
        number = sum(int(code) << (bits * i) for i, code in enumerate(column))
        columns.append([number >> (32 * i) & 0xFFFFFFFF for i in range(len(column) * bits // 32)])
    return np.array(columns, np.uint64).T.astype(np.uint32).view(np.int32)


def groups_of(weight, bits, group, symmetric):
    """(codes [N, K], scales [N, groups] float16, zero points [N, groups]) of round-to-nearest."""
    n, k = weight.shape
    count, most = -(-k // group), (1 << bits) - 1
    padded = np.zeros((n, count * group), np.float32)
    padded[:, :k] = weight
    blocks = padded.reshape(n, count, group)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    if symmetric:
        high = np.maximum(np.maximum(-low, high), 1e-4)
        scales, zeros = (2 * high / most).astype(np.float16), np.full(high.shape, 1 << (bits - 1))
    else:
        scales = (np.maximum(high - low, 1e-4) / most).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 0, most).astype(np.int64)
    codes = np.clip(np.rint(blocks / scales.astype(np.float32)[..., None]) + zeros[..., None], 0, most).astype(np.int64)
    return codes.reshape(n, -1)[:, :k], scales, zeros


def spread(x, group, k):
    return np.repeat(np.asarray(x, np.float64), group, axis=1)[:, :k]


def gptq(weight, rng, bits=4, group=32, symmetric=False, act_order=False, version=1, dtype=torch.float16):
    """(tensors, weights): with act_order, groups are of columns that lie anywhere."""
    n, k = weight.shape
    group = k if group == -1 else group
    columns = rng.permutation(k) if act_order else np.arange(k)
    codes, scales, zeros = groups_of(weight[:, columns], bits, group, symmetric)
    g_idx, natural = np.empty(k, np.int32), np.empty_like(codes)
    g_idx[columns] = np.arange(k) // group
    natural[:, columns] = codes
    stored = (zeros - version) % (1 << bits) if version == 1 else zeros
    scales = torch.from_numpy(scales).to(dtype)
    dequantised = (natural - zeros[:, g_idx]) * scales.double().numpy()[:, g_idx]
    return dict(qweight=torch.from_numpy(stream(natural.T, bits)), qzeros=torch.from_numpy(stream(stored, bits).T),
                scales=scales.T, g_idx=torch.from_numpy(g_idx)), dequantised


def awq(weight, rng, group=32, dtype=torch.float16):
    n, k = weight.shape
    codes, scales, zeros = groups_of(weight, 4, group, False)

    def words(x):  # [rows, N] -> int32 [rows, N / 8]
        out = np.zeros((len(x), x.shape[1] // 8), np.uint32)
        for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= x[:, output::8].astype(np.uint32) << np.uint32(4 * nibble)
        return torch.from_numpy(out.view(np.int32))
    scales = torch.from_numpy(scales).to(dtype)
    dequantised = (codes - spread(zeros, group, k)) * spread(scales.double().numpy(), group, k)
    return dict(qweight=words(codes.T), qzeros=words(zeros.T), scales=scales.T), dequantised


def hqq(weight, rng, bits=4, group=32, axis=1, dtype=torch.float16):
    """Zero points that are no whole numbers; rows of the grouped matrix stacked in one byte, the first part in the highest bits."""
    matrix = weight.reshape(-1, group) if axis == 1 else weight.reshape(group, -1)
    low, high = matrix.min(axis, keepdims=True), matrix.max(axis, keepdims=True)
    scale = torch.from_numpy((high - low) / ((1 << bits) - 1)).to(dtype)
    zero = torch.from_numpy(-low / scale.float().numpy()).to(dtype)
    codes = np.clip(np.rint(matrix / scale.float().numpy() + zero.float().numpy()), 0, (1 << bits) - 1).astype(np.int64)
    parts = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
    padded = np.concatenate([codes, np.zeros((-len(codes) % parts, codes.shape[1]), np.int64)])
    packed = sum(part << (bits * (parts - 1 - i)) for i, part in enumerate(np.split(padded, parts)))
    dequantised = ((codes - zero.double().numpy()) * scale.double().numpy()).reshape(weight.shape)
    tensors = dict(W_q=torch.from_numpy(packed.astype(np.int32 if bits == 3 else np.uint8)), scale=scale, zero=zero)
    tensors |= {name: torch.tensor(value, dtype=torch.int32) for name, value in (("nbits", bits), ("group_size", group), ("axis", axis))}
    return tensors, dequantised


CONFIGS = {
    gptq: lambda bits=4, group=32, version=1, **_: dict(quant_method="gptq", bits=bits, group_size=group,
                                                        checkpoint_format="gptq" if version == 1 else "gptq_v2"),
    awq: lambda group=32, **_: dict(quant_method="awq", bits=4, group_size=group, version="gemm", zero_point=True),
    hqq: lambda bits=4, group=32, axis=1, **_: dict(quant_method="hqq", skip_modules=["lm_head"], quant_config=dict(
        weight_quant_params=dict(nbits=bits, group_size=group, axis=axis))),
}


def quantise_folder(folder: Path, pack, skip=(), **options) -> dict[str, np.ndarray]:
    """Quantise the projections of a float checkpoint in place, but for names that end with one of `skip`; returns what the weights
    are now, by name."""
    tensors, exact, seed = load_file(folder / "model.safetensors"), {}, np.random.default_rng().integers(1 << 32)
    for name in [n for n in tensors if n.split(".")[-2] in PROJECTIONS and not n.removesuffix(".weight").endswith(tuple(skip))]:
        input_of = zlib.crc32(re.sub("[qkv]_proj", "qkv_proj", name.replace("gate", "up")).encode())  # siblings share their input's order
        layer, exact[name] = pack(tensors.pop(name).float().numpy(), np.random.default_rng([seed, input_of]), **options)
        tensors |= {name.removesuffix("weight") + part: value.contiguous() for part, value in layer.items()}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(quantization_config=CONFIGS[pack](**options))))
    return exact


def with_weights(model, exact):
    """The model with these weights in place of its own."""
    model.load_state_dict({name: torch.from_numpy(weight).float() for name, weight in exact.items()}, strict=False)
    return model
