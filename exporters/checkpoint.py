"""A Hugging Face folder as weights that are read row by row: safetensors only, one file or shards."""
import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Weight:
    """A matrix that is not in memory. read(start, stop) -> rows [stop - start, shape[1]] float32."""
    shape: tuple[int, int]
    read: Callable[[int, int], np.ndarray]


def concatenate(parts: list[Weight]) -> Weight:
    """The parts' rows one after another, as one weight."""
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum([part.shape[0] for part in parts])

    def read(start, stop):
        pieces = [part.read(max(start - end + part.shape[0], 0), min(stop - end, 0) + part.shape[0])
                  for part, end in zip(parts, ends) if start < end and stop > end - part.shape[0]]
        return np.concatenate(pieces) if pieces else np.zeros((0, parts[0].shape[1]), np.float32)
    return Weight((int(ends[-1]), parts[0].shape[1]), read)


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes are."""
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements start ... stop as float32. Read, not mapped: touched pages of a map would count as our memory."""
        size = ITEM_BYTES[self.dtype]
        with open(self.path, "rb") as file:
            raw = np.fromfile(file, np.uint8, (stop - start) * size, offset=self.offset + start * size)
        if raw.size != (stop - start) * size:
            raise ValueError(f"{self.path}: truncated, {(stop - start) * size - raw.size} bytes are missing; download the file again")
        if self.dtype == "BF16":  # the upper half of a float32
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return raw.view(np.float16 if self.dtype == "F16" else np.float32).astype(np.float32, copy=False)


class Checkpoint:
    """`config` is config.json; `weight` and `vector` give its tensors by name and refuse any other shape than the wanted one."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"{self.folder}: no such folder; give the folder of a Hugging Face checkpoint (config.json and *.safetensors)")
        self.config = _read_json(self.folder / "config.json")
        self.tensors = {name: tensor for path in _weight_files(self.folder) for name, tensor in _read_header(path).items()}

    def weight(self, name: str, shape: tuple[int, int]) -> Weight:
        """Matrix `name` [shape], read on demand."""
        tensor, width = self._find(name, shape), shape[1]
        return Weight(shape, lambda start, stop: tensor.read(start * width, stop * width).reshape(-1, width))

    def vector(self, name: str, size: int) -> np.ndarray:
        """Vector `name` [size] float32."""
        return self._find(name, (size,)).read(0, size)

    def read_json(self, name: str) -> dict:
        """Another JSON file of the folder; {} when it is not there."""
        return _read_json(self.folder / name) if (self.folder / name).is_file() else {}

    def _find(self, name, shape):
        if name not in self.tensors:
            raise ValueError(f"{self.folder}: tensor {name!r} is missing from the safetensors files; the checkpoint is incomplete or "
                             "of another architecture")
        tensor = self.tensors[name]
        if tensor.shape != tuple(shape):
            raise ValueError(f"{tensor.path}: {name!r} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; they belong "
                             "to different models")
        if tensor.dtype not in ITEM_BYTES:
            raise ValueError(f"{tensor.path}: {name!r} is stored as {tensor.dtype}; supported: {sorted(ITEM_BYTES)} (not an already "
                             "quantised checkpoint)")
        return tensor


def _read_json(path):
    if not path.is_file():
        raise ValueError(f"{path}: not found; give the folder of a Hugging Face checkpoint")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def _weight_files(folder):
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        found = sorted(path.name for pattern in OTHER_WEIGHTS for path in folder.glob(pattern))
        raise ValueError(f"{folder}: no model.safetensors (found {found or 'no weights'}); only safetensors is supported")
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{folder / name}: this shard, named in {index.name}, is missing; download it again")
    return [folder / name for name in names]


def _read_header(path):
    """Every tensor of a safetensors file: 8 bytes of header length, JSON, then the data."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path}: truncated or not a safetensors file; only safetensors is supported")
        try:
            header = json.loads(file.read(length))
            tensors = {name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                       for name, entry in header.items() if name != "__metadata__"}
            end = 8 + length + max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: not a safetensors file; only safetensors is supported") from None
    if end > size:
        raise ValueError(f"{path}: truncated, {end - size} of {end} bytes are missing; download the file again")
    for name, tensor in tensors.items():
        begin, stop = header[name]["data_offsets"]
        if tensor.dtype in ITEM_BYTES and stop - begin != math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]:
            raise ValueError(f"{path}: {name!r} has a size that does not fit its shape; the file is damaged")
    return tensors
