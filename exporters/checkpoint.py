"""A checkpoint as weights that are read row by row: a Hugging Face folder (safetensors, one file or shards) or a GGUF file."""
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import numpy as np

from edgeattn.exporters.stored import FLOATS, MATRICES, Bands, Stored, read_header
from edgeattn.folder import inside, read_json

OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Quantised:
    """Codes of a weight [N, K] that was quantised before: w[:, order] = (codes - zero_points) * scales, block by block.

    read(start, stop) -> for these rows
        codes        [rows, K]       uint8, 0 ... 2**bits - 1
        scales       [rows, blocks]  float32, blocks = ceil(K / block_size)
        zero_points  [rows, blocks]  uint8 or float32; None means 2**(bits - 1)
    """
    bits: int
    block_size: int
    read: Callable[[int, int], tuple[np.ndarray, np.ndarray, np.ndarray | None]]
    order: np.ndarray | None = None  # [K] int64: stored column j is input column order[j]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The weight's rows [stop - start, K] float32, columns in natural order."""
        codes, scales, zeros = self.read(start, stop)
        zeros = np.float32(1 << (self.bits - 1)) if zeros is None else self._wide(zeros.astype(np.float32), codes.shape[1])
        stored = (codes.astype(np.float32) - zeros) * self._wide(scales, codes.shape[1])
        if self.order is None:
            return stored
        out = np.empty_like(stored)
        out[:, self.order] = stored
        return out

    def _wide(self, x, k):
        return np.repeat(x, self.block_size, axis=1)[:, :k]

    def widen(self, bits: int, block_size: int) -> "Quantised":
        """The same weight with codes of at least as many bits and blocks that divide these."""
        def read(start, stop):
            codes, scales, zeros = self.read(start, stop)
            if zeros is None and bits != self.bits:
                zeros = np.full(scales.shape, 1 << (self.bits - 1), np.uint8)
            times, blocks = self.block_size // block_size, -(-codes.shape[1] // block_size)
            scales, zeros = (x if x is None else np.repeat(x, times, axis=1)[:, :blocks] for x in (scales, zeros))
            return codes, scales, zeros
        return self if (bits, block_size) == (self.bits, self.block_size) else replace(self, bits=bits, block_size=block_size, read=read)


@dataclass(frozen=True)
class Ternary:
    """A weight [N, K] that is -1, 0 or 1 times a scale of each output. read(start, stop) -> rows [stop - start, K] int8."""
    read: Callable[[int, int], np.ndarray]
    scales: np.ndarray     # [N] float32
    activation_bits: int   # to which what it multiplies is rounded, token by token: 8 or 4


@dataclass(frozen=True)
class Weight:
    """A matrix that is not in memory. read(start, stop) -> rows [stop - start, shape[1]] float32."""
    shape: tuple[int, int]
    read: Callable[[int, int], np.ndarray]
    quantised: Quantised | None = None  # the same weight as codes, when an export can hold them exactly
    stored_as: str = ""                 # what its codes are, when it has any: "gptq 4 bits, groups of 128"
    ternary: Ternary | None = None      # the same weight as -1, 0 and 1


def concatenate(parts: list[Weight]) -> Weight:
    """The parts' rows one after another, as one weight. Codes stay codes, as wide as the widest part's and in its smallest blocks,
    when all parts have some and agree on the order of columns."""
    if len(parts) == 1:
        return parts[0]

    def read(start, stop):
        pieces = [part.read(*span) for part, span in _spans(parts, start, stop)]
        return np.concatenate(pieces) if pieces else np.zeros((0, parts[0].shape[1]), np.float32)
    shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
    kinds = " + ".join(dict.fromkeys(part.stored_as or "floats" for part in parts)) if any(part.stored_as for part in parts) else ""
    return Weight(shape, read, _concatenate_codes(parts), kinds, _concatenate_ternary(parts))


def _spans(parts, start, stop):
    """(part, its own range of rows) of what lies between rows start and stop of the whole."""
    first = 0
    for part in parts:
        span = max(start - first, 0), min(stop - first, part.shape[0])
        if span[0] < span[1]:
            yield part, span
        first += part.shape[0]


def _concatenate_codes(parts):
    found = [part.quantised for part in parts]
    if None in found or any(not np.array_equal(q.order, found[0].order) for q in found):
        return None
    bits, block_size = max(q.bits for q in found), min(q.block_size for q in found)
    wide = [replace(part, quantised=part.quantised.widen(bits, block_size)) for part in parts]
    kinds = {None if zeros is None else zeros.dtype for zeros in (part.quantised.read(0, 1)[2] for part in wide)}
    kind = None if kinds == {None} else np.float32 if np.dtype(np.float32) in kinds else np.uint8

    def read(start, stop):
        codes, scales, zeros = zip(*(part.quantised.read(*span) for part, span in _spans(wide, start, stop)))
        if kind is not None:
            zeros = [np.full(s.shape, 1 << (bits - 1), kind) if z is None else z.astype(kind) for s, z in zip(scales, zeros)]
        return np.concatenate(codes), np.concatenate(scales), None if kind is None else np.concatenate(zeros)
    return Quantised(bits, block_size, read, found[0].order)


def _concatenate_ternary(parts):
    found = [part.ternary for part in parts]
    if None in found:
        return None
    bits, = {ternary.activation_bits for ternary in found}  # parts take the same input
    return Ternary(lambda start, stop: np.concatenate([part.ternary.read(*span) for part, span in _spans(parts, start, stop)]),
                   np.concatenate([ternary.scales for ternary in found]), bits)


def open_checkpoint(path: str | Path):
    """The checkpoint in a folder, or in a GGUF file: `Checkpoint`, or what looks like one."""
    if Path(path).is_file():
        return import_module("edgeattn.exporters.imports.gguf").GGUF(path)
    return Checkpoint(path)


class Checkpoint:
    """`config` is config.json; `weight` and `vector` give its tensors by name and refuse any other shape than the wanted one.
    What `quantization_config` names is read by the file of that name in imports/."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; give the folder of a Hugging Face checkpoint (config.json and *.safetensors)")
        self.described_by = inside(self.folder, "config.json")
        self.config = _read_json(self.described_by)
        self.quantised_by = import_module("edgeattn.exporters.imports").find(self.config, self.described_by)
        self.bands = Bands()
        self.tensors = {name: tensor for path in _weight_files(self.folder) for name, tensor in read_header(path).items()}

    @property
    def config_sha256(self) -> str:
        return hashlib.sha256(self.described_by.read_bytes()).hexdigest()

    def weight(self, name: str, shape: tuple[int, int]) -> Weight:
        """Matrix `name` [shape], read on demand."""
        found = self.quantised_by and self.quantised_by.read_weight(self, name.removesuffix(".weight"), shape)
        if found:
            return found
        tensor, width = self.find(name, shape, MATRICES), shape[1]
        return Weight(shape, lambda start, stop: tensor.read(start * width, stop * width).reshape(-1, width))

    def vector(self, name: str, size: int) -> np.ndarray:
        """Vector `name` [size] float32."""
        return self.find(name, (size,)).read(0, size)

    def read_json(self, name: str) -> dict:
        """Another JSON file of the folder; {} when it is not there."""
        return read_json(self.folder / name) if inside(self.folder, name).is_file() else {}

    def copy_files(self, names: tuple[str, ...], folder: Path) -> None:
        """Copy those of the files that are there."""
        for name in names:
            if inside(self.folder, name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def find(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Stored:
        """Where tensor `name` is; ValueError when it is missing, of another shape or of another type."""
        if name not in self.tensors:
            raise ValueError(f"{self.folder}: tensor {name!r} is missing from the safetensors files; the checkpoint is incomplete or "
                             "of another architecture")
        tensor = self.tensors[name]
        if tensor.shape != tuple(shape):
            raise ValueError(f"{tensor.path}: {name!r} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; they belong "
                             "to different models")
        if tensor.dtype not in dtypes:
            raise ValueError(f"{tensor.path}: {name!r} is stored as {tensor.dtype}; supported: {sorted(dtypes)}")
        return tensor


def _read_json(path):
    if not path.is_file():
        raise ValueError(f"{path}: not found; give the folder of a Hugging Face checkpoint")
    return read_json(path)


def _weight_files(folder):
    index = inside(folder, "model.safetensors.index.json")
    if inside(folder, "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        found = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
        raise ValueError(f"{folder}: no model.safetensors (found {found or 'no weights'}); only safetensors is supported")
    try:
        names = sorted(set(_read_json(index)["weight_map"].values()))
        missing = [name for name in names if not inside(folder, name).is_file()]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(f"{index}: has no weight_map of file names; download it again") from None
    if missing:
        raise ValueError(f"{folder / missing[0]}: this shard, named in {index.name}, is missing; download it again")
    return [folder / name for name in names]
