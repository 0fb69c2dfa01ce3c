"""What the fuzzers of what a model folder holds and of sessions share: loading a blob, and using what was loaded.

A blob of parts is each part's length in 4 bytes and its bytes: edgeattn.json, model.onnx and model.onnx.data; or tokenizer.json,
tokenizer_config.json and chat_template.jinja. One of a session is the file.
"""
import hashlib
import json
import os
import random
import struct
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from importing import NASTY, RAM, bits, change_json, cut, number

from edgeattn.cache import session
from edgeattn.cache.options import CacheOptions
from edgeattn.cache.pages import CacheFull
from edgeattn.cache.session_file import NO_SUM
from edgeattn.conversation import Conversation
from edgeattn.generation import SamplerOptions
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions
from edgeattn.templates import TemplateProcess
from edgeattn.tokenizer import Tokenizer

PARTS = {"export": ("edgeattn.json", "model.onnx", "model.onnx.data"),
         "tokenizer": ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")}
DENSE = dict(threads=1, sparse=SparseOptions("off"), prefill=PrefillOptions("off"))
CPU_SECONDS = 10  # of one blob
TEXT = "Hello w\xf6rld, \U0001f600 aaaa 1234  <s>\n</s>"
CACHES = (CacheOptions("f16", "f16"), CacheOptions("int4", "int4", window=32))


def join(parts) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def split(blob: bytes, count: int) -> list[bytes]:
    """`count` parts, the last ones empty where the blob ends early."""
    parts = []
    for _ in range(count):
        length = int.from_bytes(blob[:4], "little")
        parts.append(blob[4:4 + length])
        blob = blob[4 + length:]
    return parts


class Loader:
    """read(blob) -> what it was refused with, or None. Any error but ours in one line is a fault; so is a crash of what was let through."""

    def __init__(self, kind: str, corpus: Path):
        self.kind, self.run = kind, getattr(self, f"_{kind}")
        if kind == "session":
            self._folder = tempfile.TemporaryDirectory()
            unpack((corpus / "export/valid0").read_bytes(), "export", Path(self._folder.name))
            self._models = [Model(self._folder.name, cache=cache, **DENSE) for cache in CACHES]
        self._templates = TemplateProcess()  # one for all
        self._templates.render("", {})       # begins now, which is no slow input's fault

    def read(self, blob: bytes) -> str | None:
        refused, begun = None, time.process_time()
        with tempfile.TemporaryDirectory(dir=RAM if os.path.isdir(RAM) else None) as folder:
            try:
                self.run(blob, Path(folder))
            except (ValueError, CacheFull) as error:
                refused = str(error)
                assert "\n" not in refused and len(refused) < 2000, refused
        assert time.process_time() - begun < CPU_SECONDS, "slow"
        return refused

    def _export(self, blob, folder):
        unpack(blob, "export", folder)
        model = Model(folder, **DENSE)
        sequence = model.new_sequence()
        model.forward([(sequence, [0, model.vocab_size - 1, 1])])
        model.forward([(sequence, [2])])

    def _session(self, blob, folder):
        (folder / "session").write_bytes(blob)
        for model in self._models[1:] + self._models[:1]:
            chat = Conversation(model, None, SamplerOptions(repeat_penalty=1.1, repeat_last_n=-1, seed=3))
            try:
                chat.restore(folder / "session")
                logits = model.forward([(chat._sequence, [3])])
                chat._sampler(logits[0], chat._cached)
                session.save(folder / "again", model.cache, chat._sequence, [*chat._cached, 3], model.config, {})
                model.free(chat._sequence)
                return
            except ValueError as error:
                refused = error
        raise refused

    def _tokenizer(self, blob, folder):
        unpack(blob, "tokenizer", folder)
        tokenizer = Tokenizer(folder)
        tokenizer._templates = self._templates
        ids = tokenizer.encode(TEXT)
        stream = tokenizer.stream()
        "".join(stream.add(token) for token in [*ids[:20], 1 << 31]) + stream.flush()
        tokenizer.encode_chat([{"role": "user", "content": TEXT}, {"role": "assistant", "content": "x"}])


def unpack(blob: bytes, kind: str, folder: Path) -> None:
    for name, part in zip(PARTS[kind], split(blob, 3)):
        (folder / name).write_bytes(part)


# ---- damage --------------------------------------------------------------------------------------------------------
def damage(blob: bytes, rng: random.Random, kind: str) -> bytes:
    """The blob with one to three things wrong, and a session's checksum right, so that more than that is looked at."""
    for _ in range(rng.randint(1, 3)):
        blob = _session_damage(blob, rng) if kind == "session" else _parts_damage(blob, rng, kind)
    return blob


def _parts_damage(blob, rng, kind):
    parts = split(blob, 3)
    which = rng.randrange(3)
    if kind == "export" and which == 1 and rng.random() < 0.8:
        parts[1] = _onnx(parts[1], rng)
    elif rng.random() < 0.7 and which != 1 + (kind == "tokenizer"):
        parts[which] = change_json(parts[which], rng)
    else:
        parts[which] = rng.choice((bits, cut, number))(parts[which], rng)
    return join(parts)


def _session_damage(blob, rng):
    length = int.from_bytes(blob[:8], "little")
    header, rest = blob[8:8 + length], blob[8 + length:]
    kind = rng.randrange(4)
    if kind == 0:
        header = change_json(header, rng)
    elif kind == 1:  # what is JSON within the metadata
        try:
            whole = json.loads(header)
            name = rng.choice(("meta", "settings"))
            whole["__metadata__"][name] = change_json(whole["__metadata__"][name].encode(), rng).decode("utf-8", "replace")
            header = json.dumps(whole).encode()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            pass
    elif kind == 2:
        rest = rng.choice((bits, cut, number))(rest, rng)
    else:
        header = rng.choice((bits, cut))(header, rng)
    return _signed(header, rest)


def _signed(header, rest):
    try:
        whole = json.loads(header)
        whole["__metadata__"]["checksum"] = NO_SUM
        header = json.dumps(whole).encode()
        whole["__metadata__"]["checksum"] = hashlib.sha256(struct.pack("<Q", len(header)) + header + rest).hexdigest()
        header = json.dumps(whole).encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    return struct.pack("<Q", len(header)) + header + rest


def _onnx(blob, rng):
    """One thing in the graph exchanged for another one of its kind."""
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(blob)
        node, other = (rng.choice(proto.graph.node) for _ in range(2))
        tensor = rng.choice(proto.graph.initializer)
        names = [name for n in proto.graph.node for name in (*n.input, *n.output)] + ["", "x"]
        rng.choice((_wire, _attribute, _dims, _location, _kind))(node, other, tensor, names, proto, rng)
        return proto.SerializeToString()
    except (DecodeError, ValueError, IndexError):  # damaged before
        return blob


def _wire(node, other, tensor, names, proto, rng):
    ends = rng.choice((node.input, node.output))
    ends[rng.randrange(len(ends))] = rng.choice(names)


def _attribute(node, other, tensor, names, proto, rng):
    a = rng.choice(node.attribute) if node.attribute and rng.random() < 0.8 else node.attribute.add()
    b = rng.choice(other.attribute) if other.attribute else a
    if a.name and rng.random() < 0.7:
        a.i = rng.choice([x for x in NASTY if type(x) is int and abs(x) < 1 << 63] + [16, 32, 64])
        a.f = rng.choice((0.0, 1e30, float("nan")))
    elif rng.random() < 0.5:
        a.CopyFrom(b)
    else:
        a.name, a.type, a.i = rng.choice(("x", "out", "out.stride", "workspace", "weight", "codes", "group", "batch.slots")), 2, 64


def _dims(node, other, tensor, names, proto, rng):
    place = rng.randrange(len(tensor.dims))
    tensor.dims[place] = rng.choice((0, 1, -1, 2, 1 << 40, (1 << 63) - 1, tensor.dims[place] * 2, tensor.dims[place] // 2))


def _location(node, other, tensor, names, proto, rng):
    if tensor.data_location:
        entry = rng.choice(tensor.external_data)
        entry.value = rng.choice(("../../etc/passwd", "/etc/passwd", "..", "", "-1", "0", "1", "64", str(1 << 70), "x",
                                  str(entry.value) + "0"))
    else:
        tensor.raw_data = np.array([rng.choice((0, -1, 1, 2, 1 << 40)) for _ in range(len(tensor.raw_data) // 8)], np.int64).tobytes()


def _kind(node, other, tensor, names, proto, rng):
    what = rng.randrange(4)
    if what == 0:
        node.op_type = rng.choice((other.op_type, "Tanh", "Split", "Reshape", "Identity", "sample", "ConstantOfShape", "Loop"))
    elif what == 1:
        node.domain = rng.choice(("", "edgeattn", "com.microsoft", "x"))
    elif what == 2:
        tensor.data_type = rng.randrange(24)
    else:
        proto.graph.node.remove(node)


def fuzz(kind: str) -> None:
    """Run atheris on one loader; arguments are libFuzzer's."""
    from importing import CORPUS, run
    loader = Loader(kind, CORPUS)
    run(kind, loader.read, damage)
