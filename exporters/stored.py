"""Tensors in safetensors files: where each one's bytes are, and reading part of them."""
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
              "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = ("F32", "F16", "BF16")
MATRICES = (*FLOATS, "F8_E4M3")  # types of a matrix that needs no scale
INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8}
BAND_BYTES, MOST_BANDS = 16 << 20, 3
LONGEST_HEADER = 32 << 20  # bytes of JSON, which may take twenty times as much in memory; a hundred thousand tensors take a third


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes are."""
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements start ... stop as float32."""
        size = ITEM_BYTES[self.dtype]
        return as_float(read_bytes(self.path, self.offset + start * size, (stop - start) * size), self.dtype)

    def integers(self, start: int, stop: int) -> np.ndarray:
        """Elements start ... stop of a tensor of integers, in their own type."""
        kind = np.dtype(INTEGERS[self.dtype])
        return read_bytes(self.path, self.offset + start * kind.itemsize, (stop - start) * kind.itemsize).view(kind)

    def columns(self, start: int, stop: int) -> np.ndarray:
        """Columns start ... stop of a matrix, in its own type ("BF16" as uint16)."""
        rows, width = self.shape
        size = ITEM_BYTES[self.dtype]
        out = np.empty((rows, (stop - start) * size), np.uint8)
        with open(self.path, "rb") as file:
            for i in range(rows):
                file.seek(self.offset + (i * width + start) * size)
                if file.readinto(out[i].data) != out.shape[1]:
                    raise ValueError(f"{self.path}: truncated; download the file again")
        return out.view({"F16": np.float16, "BF16": np.uint16, "F32": np.float32, **INTEGERS}[self.dtype])


class Bands:
    """Columns of matrices that are stored row by row. Reads of a few columns at a time, in order, are cut from wide bands, because
    each read from a file costs as much as a thousand of its bytes."""

    def __init__(self):
        self._bands = {}  # tensor: (first column, the columns from there on), the last few that were asked for

    def read(self, tensor: Stored, start: int, stop: int) -> np.ndarray:
        """Columns start ... stop, as Stored.columns gives them."""
        first, band = self._bands.pop(tensor, (0, np.empty((0, 0))))
        if not first <= start <= stop <= first + band.shape[1]:
            rows, width = tensor.shape
            first, band = start, tensor.columns(start, min(max(stop, start + BAND_BYTES // (8 * max(rows, 1))), width))
        self._bands[tensor] = first, band
        if len(self._bands) > MOST_BANDS:
            del self._bands[next(iter(self._bands))]
        return band[:, start - first:stop - first]


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """uint8 [count]. Read, not mapped: touched pages of a map would count as our memory."""
    with open(path, "rb") as file:
        raw = np.fromfile(file, np.uint8, count, offset=offset)
    if raw.size != count:
        raise ValueError(f"{path}: truncated, {count - raw.size} bytes are missing; download the file again")
    return raw


def as_float(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes, or values in their own type, of a tensor of floats as float32."""
    if dtype == "F8_E4M3":
        return FLOAT8[raw]
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32, copy=False)


def _float8():
    """The values of the 256 bytes: sign, 4 bits of exponent, 3 of mantissa; no infinities."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0 ** -6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    size[byte & 127 == 127] = np.nan
    return np.where(byte & 128, -size, size).astype(np.float32)


FLOAT8 = _float8()


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file: 8 bytes of header length, JSON, then the data."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path}: truncated or not a safetensors file; only safetensors is supported")
        try:
            header = json.loads(file.read(length)) if length <= LONGEST_HEADER else None
            entries = {name: _entry(value) for name, value in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path}: not a safetensors file; only safetensors is supported") from None
    data = 8 + length
    end = data + max((stop for *_, stop in entries.values()), default=0)
    if end > size:
        raise ValueError(f"{path}: truncated, {end - size} of {end} bytes are missing; download the file again")
    for name, (dtype, shape, start, stop) in entries.items():
        if dtype in ITEM_BYTES and stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{path}: {name!r} has a size that does not fit its shape; the file is damaged")
    return {name: Stored(path, dtype, shape, data + start) for name, (dtype, shape, start, _) in entries.items()}


def _entry(value):
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)) or start > stop:
        raise ValueError("not what safetensors writes")
    return dtype, shape, start, stop
