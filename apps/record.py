"""What every result says of itself, whichever command made it: model, setting, command, machine, date, version."""
import argparse
import json
import os
import platform
import shlex
import sys
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path

import edgeattn
from edgeattn.apps import axes
from edgeattn.device_profile import processor

FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")  # that kernels make use of


def common(kind: str, args: argparse.Namespace, model) -> dict:
    """The fields that all results share. args: of one setting (axes.expand); model: the runtime's Model."""
    return {"kind": kind, "model": model_name(model.config), "setting": axes.setting(args), "command": command(),
            "machine": machine(model.device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "edgeattn": edgeattn.__version__}


def command() -> str:
    """What the user typed."""
    return shlex.join(["edgeattn", *sys.argv[1:]])


def model_name(config: dict) -> str:
    """What people call an export, from its edgeattn.json: `nano int4`."""
    source = config.get("source", {})
    return f"{source.get('name') or source.get('folder') or 'unknown'} {config.get('precision', '')}".strip()


def machine(device: str = "cpu") -> str:
    """Processor or GPU, cores, instructions, memory and system, in a line."""
    if device == "cpu":
        return host()
    from edgeattn.kernels_cuda.device import about
    return f"{about()['name']}, {host()}"


def host() -> str:
    """The machine without its GPU."""
    import psutil
    flags = _instructions()
    name = _board() or processor()
    features = " ".join(flag for flag in FEATURES if flag in flags)
    return ", ".join([name, f"{psutil.cpu_count()} cores{f' ({features})' if features else ''}",
                      f"{psutil.virtual_memory().total / 2**30:.1f} GiB", f"{platform.system()} {platform.release().partition('-')[0]}",
                      f"Python {platform.python_version()}"])


def _board():
    """What a board with a device tree calls itself: `Raspberry Pi 5 Model B Rev 1.0`."""
    try:
        return Path("/proc/device-tree/model").read_text(errors="replace").strip(" \0\n")
    except OSError:
        return ""


def _instructions():
    """What the processor can do, as /proc/cpuinfo has it for the first core."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next((line.split(":")[1].split() for line in file if line.startswith(("flags\t", "Features\t"))), [])
    except OSError:
        return []


def read(path: str | os.PathLike) -> list[dict]:
    """The results of a file, one a line; a last line that a crash has cut off does not count. ValueError names a line that is no result."""
    needed, found = _required(), []
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1] if _cut(lines[-1]) else lines, 1):
        result = _parse(line)
        wanted = needed.get(str(result.get("kind"))) if isinstance(result, dict) else None
        if wanted is None or not wanted <= result.keys():
            raise ValueError(f"{path}, line {number}: no result of this version of `edgeattn bench` or `edgeattn eval`; give another file")
        found.append(result)
    return found


def _required() -> dict[str, set[str]]:
    """{kind: the fields without which a result is none}."""
    from edgeattn.apps.bench_report import Row
    common = {"kind", "model", "setting", "command", "machine", "date", "edgeattn"}
    return {"bench": {one.name for one in fields(Row)}, "eval": common | {"task", "depth", "samples", "score", "low", "high", "metrics"}}


def _parse(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


def _cut(last):
    """Whether a last line without an end is nothing, or what a crash has left of a result: not a whole one, and not a user's own text."""
    return last[:8] == '{"kind":'[:len(last)] and _parse(last) is None


def append(path: str | os.PathLike, result: dict) -> None:
    """Add a result to a file, in the place of what a crash has cut off there."""
    with open(path, "ab+") as file:
        file.seek(0)
        held, _, last = file.read().rpartition(b"\n")
        if _cut(last.decode(errors="replace")):
            file.truncate(len(held) + bool(held))
        else:
            file.write(b"\n")
        file.write(json.dumps(result).encode() + b"\n")
