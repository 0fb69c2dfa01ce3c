"""The header of a GGUF file (versions 2 and 3, little endian): settings and where every tensor is.

    magic "GGUF", version u32, tensors u64, settings u64
    settings   name, type u32, value              a string is its length u64 and UTF-8; an array its type u32, length u64, items
    tensors    name, dimensions u32, that many u64 (innermost first), type u32, offset u64
    data       at the next multiple of general.alignment (32)
Lengths are believed only as far as the file reaches, so that a damaged file costs no memory.
"""
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS, LONGEST_NAME = 4, 64  # of tensors


@dataclass(frozen=True)
class Block:
    """A tensor's type: `bytes` hold `elements` neighbours of a row."""
    name: str
    elements: int
    bytes: int


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: shape as NumPy has it (rows first), where its bytes are."""
    path: Path
    type: Block
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.elements * self.type.bytes


def read_gguf(path: Path, types: dict[int, Block], others: dict[int, str]) -> tuple[dict, dict[str, Entry]]:
    """(settings by name, tensors by name); ValueError when it is no GGUF file, a damaged one, or has tensors of other types than
    `types` (`others` names some of those)."""
    with open(path, "rb") as file:
        reader = _Reader(file, path, os.path.getsize(path))
        if reader.take(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
        version, tensors, settings = reader.scalars("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"{path}: GGUF version {version} (or big-endian) cannot be read; supported: 2 and 3, little-endian")
        about = {}
        for _ in range(reader.count(settings, 13)):
            name = reader.string()
            about[name] = reader.value(reader.scalar("<I"))
        found = dict(reader.tensor() for _ in range(reader.count(tensors, 32)))
        start = file.tell()
    alignment = about.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise ValueError(f"{path}: general.alignment {alignment!r} is no power of two; the file is damaged")
    start = -(-start // alignment) * alignment
    return about, {name: _entry(path, name, start, types, others, *entry) for name, entry in found.items()}


def _entry(path, name, start, types, others, shape, kind, offset):
    if kind not in types:
        raise ValueError(f"{path}: {name!r} is of type {others.get(kind, kind)}, which cannot be read; supported: "
                         f"{', '.join(block.name for block in types.values())}")
    block, end = types[kind], os.path.getsize(path)
    if shape[-1] % block.elements:
        raise ValueError(f"{path}: {name!r} has rows of {shape[-1]}, no multiple of {block.name}'s {block.elements}; the file is damaged")
    size = math.prod(shape) // block.elements * block.bytes
    if start + offset + size > end:
        raise ValueError(f"{path}: truncated, {start + offset + size - end} bytes of {name!r} are missing; download the file again")
    return Entry(path, block, shape, start + offset)


class _Reader:
    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.size = file, path, size

    def take(self, count):
        if count > self.size - self.file.tell():
            raise ValueError(f"{self.path}: truncated or damaged: its header asks for {count} bytes more than there are; download it again")
        return self.file.read(count)

    def scalars(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def scalar(self, form):
        return self.scalars(form)[0]

    def count(self, n, least):
        """n items of at least that many bytes each, if the file can hold them."""
        if n * least > self.size - self.file.tell():
            raise ValueError(f"{self.path}: truncated or damaged: its header counts {n} items; download it again")
        return n

    def string(self):
        return self.take(self.scalar("<Q")).decode("utf-8", "replace")

    def value(self, kind):
        if kind in SCALARS:
            return self.scalar("<" + SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"{self.path}: a setting of unknown type {kind}; the file is damaged")
        inner, n = self.scalars("<IQ")
        if inner in SCALARS:
            kind = np.dtype("?" if inner == 7 else "<" + SCALARS[inner])
            return np.frombuffer(self.take(self.count(n, kind.itemsize) * kind.itemsize), kind)
        if inner != STRING:
            raise ValueError(f"{self.path}: an array of type {inner} among the settings; the file is damaged")
        return [self.string() for _ in range(self.count(n, 8))]

    def tensor(self):
        name, dimensions = self.string()[:LONGEST_NAME], self.scalar("<I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{self.path}: {name!r} has {dimensions} dimensions; the file is damaged")
        shape = self.scalars(f"<{dimensions}Q")
        kind, offset = self.scalars("<IQ")
        return name, (shape[::-1], kind, offset)
