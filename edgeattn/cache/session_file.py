"""Session files as files: safetensors with a checksum, replaced as a whole, refused when anything is wrong with them.

The header's __metadata__ holds strings; these are known here:
    format, version   FORMAT, VERSION (to be raised whenever the bytes of a page change their meaning)
    checksum          sha256 of the whole file, with zeros in the place of these 64 characters
    edgeattn          the version that wrote it
"""
import glob
import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

import edgeattn

FORMAT, VERSION = "edgeattn session", 1
LONGEST_HEADER = 16 << 20  # of JSON, which may take twenty times as much in memory
CHUNK_BYTES = 4 << 20  # pages are gathered and read in pieces, so that saving needs no second copy of the cache
NO_SUM = "0" * 64
NAMES = {"uint8": "U8", "uint16": "U16", "int32": "I32", "float32": "F32"}


class SessionError(ValueError):
    """The file cannot be continued here; the message says why, without the file's name."""


def write(file, metadata: dict[str, str], tensors: dict) -> None:
    """Write a safetensors file and put its checksum in; `metadata` without what is known here.

    tensors  {name: (array, the rows of it that are meant, in that order, or None for all)}
    """
    metadata = {"format": FORMAT, "checksum": NO_SUM, "version": str(VERSION), "edgeattn": edgeattn.__version__} | metadata
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][0].itemsize))  # so all are aligned
    header, end = {"__metadata__": metadata}, 0
    for name, (array, rows) in tensors.items():
        shape = list(array.shape) if rows is None else [len(rows), *array.shape[1:]]
        start, end = end, end + array.itemsize * int(np.prod(shape))
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER:
        raise OSError(f"the conversation's text is longer than {LONGEST_HEADER >> 20} MiB")
    sums = hashlib.sha256()
    for piece in (len(text).to_bytes(8, "little"), text):
        file.write(piece)
        sums.update(piece)
    for array, rows in tensors.values():
        for piece in _pieces(array, rows):
            file.write(piece)
            sums.update(piece)
    file.seek(8 + text.index(NO_SUM.encode()))
    file.write(sums.hexdigest().encode())


def _pieces(array, rows):
    if rows is None:
        yield array.tobytes()
        return
    step = max(1, CHUNK_BYTES // array[:1].nbytes)
    for start in range(0, len(rows), step):
        yield array[rows[start:start + step]].tobytes()


def discard_parts(path: Path) -> None:
    """Remove what processes that were killed have left of a file that they wrote beside `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        process = left.name.split(".")[-2]
        if re.fullmatch("[0-9]{1,9}", process) and (int(process) == os.getpid() or not psutil.pid_exists(int(process))):
            left.unlink(missing_ok=True)


def replace(path, write_to) -> None:
    """Make `path` what write_to(file) writes, or leave it as it is: the new file is written beside it, synced, and renamed. OSError."""
    real = Path(os.path.realpath(path))  # the rename must not replace a link
    discard_parts(real)
    part = real.with_name(f".{real.name}.{os.getpid()}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:  # a conversation is private
            if real.exists():
                os.fchmod(file.fileno(), real.stat().st_mode & 0o777)
            write_to(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, real)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every file system can; the file is in its place
        folder = os.open(real.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or the new name may be lost with the power
        finally:
            os.close(folder)


def read_metadata(path) -> dict[str, str]:
    """The header's strings, also of a newer version's file; only the header is read. OSError; SessionError: the file is no session."""
    if not os.path.isfile(path):
        os.stat(path)  # FileNotFoundError
        raise SessionError("not a session file")  # a folder, a device; opening a pipe would wait
    with open(path, "rb") as file:
        return _read_header(file)[0]


def _read_header(file):
    """(metadata, the header's bytes, the length of the file that it announces)"""
    length = int.from_bytes(file.read(8), "little")
    text = file.read(length) if length <= min(LONGEST_HEADER, os.fstat(file.fileno()).st_size) else b""
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        ours = metadata["format"] == FORMAT and all(isinstance(value, str) for value in metadata.values())
        checksum = metadata["checksum"]
        end = 8 + length + max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        ours = False
    if not ours:
        raise SessionError("not a session file, or damaged at its beginning")
    return metadata, text.replace(checksum.encode(), NO_SUM.encode(), 1), end


def check(path) -> dict[str, str]:
    """Read the whole file and compare it with its checksum -> its metadata. OSError; SessionError: not a session, another version,
    damaged."""
    version = read_metadata(path).get("version")
    if version != str(VERSION):
        raise SessionError(f"a session of format {version}, and this edgeattn reads format {VERSION}")
    with open(path, "rb") as file:
        metadata, text, end = _read_header(file)
        if os.fstat(file.fileno()).st_size != end:
            raise SessionError(f"damaged: it should have {end} bytes and has {os.fstat(file.fileno()).st_size}")
        sums = hashlib.sha256(len(text).to_bytes(8, "little") + text)
        while piece := file.read(CHUNK_BYTES):
            sums.update(piece)
    if sums.hexdigest() != metadata["checksum"]:
        raise SessionError("damaged: its checksum is wrong")
    return metadata
