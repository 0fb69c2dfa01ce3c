"""What all fuzzers of the importers share: reading a blob as a checkpoint, whole; and damaging one with an eye to its structure.

A blob of a folder is config.json, a zero byte, model.safetensors; one of a GGUF file is the file.
"""
import json
import os
import random
import struct
import tempfile
from pathlib import Path

from edgeattn.exporters.checkpoint import open_checkpoint
from edgeattn.exporters.decoder import build
from edgeattn.exporters.families import families, read_architecture
from edgeattn.exporters.weights import Formats

CORPUS = Path(__file__).parent / "corpus"
NASTY = (0, 1, -1, 2, 3, 7, 31, 255, 1 << 31, 1 << 63, (1 << 64) - 1, 1 << 200, 0.5, -1e308, float("nan"), float("inf"), "", "4", "\0",
         True, None, [], {}, [[]], [1 << 40], {"a": 1})
RAM = "/dev/shm"


def read(blob: bytes, gguf: bool) -> str | None:
    """Everything that an export reads, of this blob; what it was refused with, or None. Any error but a ValueError of one line, and
    more than one slab in memory, is a fault."""
    with tempfile.TemporaryDirectory(dir=RAM if os.path.isdir(RAM) else None) as folder:
        path = Path(folder) / "model"
        if gguf:
            path.write_bytes(blob)
        else:
            path.mkdir()
            config, _, tensors = blob.partition(b"\0")
            (path / "config.json").write_bytes(config)
            (path / "model.safetensors").write_bytes(tensors)
        try:
            _export(path, Path(folder))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
            return str(error)
    return None


def _export(path, folder):
    source = open_checkpoint(path)
    decoder = read_architecture(source)
    graph = build(decoder, source, Formats("int4", 32), min(decoder.max_position, 64))
    source.copy_files(("tokenizer.json",), folder)
    for _, slabs in graph._streams:
        for _ in slabs():
            pass


def damage(blob: bytes, rng: random.Random, gguf: bool) -> bytes:
    """The blob with one to three things wrong."""
    for _ in range(rng.randint(1, 3)):
        blob = rng.choice((bits, cut, number) if gguf else (bits, cut, _config, _config, _header, _header))(blob, rng)
    return blob


def bits(blob: bytes, rng: random.Random) -> bytes:
    out, most = bytearray(blob), rng.choice((64, 4096, len(blob)))  # mostly where lengths and names are
    for _ in range(rng.randint(1, 8)):
        if out:
            out[rng.randrange(min(most, len(out)))] = rng.randrange(256)
    return bytes(out)


def cut(blob: bytes, rng: random.Random) -> bytes:
    return blob[:rng.randrange(len(blob) + 1)]


def number(blob: bytes, rng: random.Random) -> bytes:
    """Eight bytes that may be a length."""
    at = rng.randrange(max(min(len(blob) - 8, 4096), 1))
    return blob[:at] + struct.pack("<Q", rng.choice((0, 1, 255, 1 << 31, 1 << 40, (1 << 64) - 1))) + blob[at + 8:]


def _config(blob, rng):
    config, zero, rest = blob.partition(b"\0")
    return change_json(config, rng) + zero + rest


def _header(blob, rng):
    config, zero, rest = blob.partition(b"\0")
    if len(rest) < 8:
        return blob
    length = struct.unpack("<Q", rest[:8])[0]
    header = change_json(rest[8:8 + length], rng)
    return config + zero + struct.pack("<Q", len(header)) + header + rest[8 + length:]


def change_json(text: bytes, rng: random.Random) -> bytes:
    """One value somewhere in it replaced, removed, or moved to another name."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return text
    places = list(_places(whole))
    if not places:
        return text
    holder, key = rng.choice(places)
    what = rng.randrange(4)
    if what == 0 and isinstance(holder, dict):
        del holder[key]
    elif what == 1:
        other, name = rng.choice(places)
        holder[key] = other.get(name) if isinstance(other, dict) else other[name]
    else:
        holder[key] = rng.choice(NASTY)
    try:
        return json.dumps(whole).encode()
    except (ValueError, RecursionError):  # it holds itself now
        return text


def _places(value):
    """(holder, key) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def fuzz(loader: str) -> None:
    """Run atheris on one importer; arguments are libFuzzer's."""
    families()  # imports all there is, which is no slow input's fault
    gguf = loader == "gguf"
    run(loader, lambda data: read(data, gguf), lambda data, rng, _: damage(data, rng, gguf))


def run(name: str, use, damage) -> None:
    """atheris with use(blob) and damage(blob, rng, name), from a copy of the corpus of that name."""
    import shutil
    import sys

    import atheris
    corpus = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    for path in (CORPUS / name).iterdir():
        shutil.copy(path, corpus)

    def mutate(data, most, seed):
        rng = random.Random(seed)
        return (damage(data, rng, name) if rng.random() < 0.6 else atheris.Mutate(data, most))[:most]
    atheris.Setup([*sys.argv, str(corpus)], lambda data: use(data), custom_mutator=mutate)
    atheris.Fuzz()
