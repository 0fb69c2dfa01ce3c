"""What every result says of itself, whichever command made it: model, setting, command, machine, date, version."""
import argparse
import hashlib
import json
import os
import platform
import shlex
import sys
from dataclasses import fields
from datetime import datetime, timezone
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import edgeattn
from edgeattn.apps import axes
from edgeattn.device_profile import processor

CODE = {"edgeattn": {"apps", "exporters", "kernels_cpu", "kernels_cuda"}, "edgeattn.kernels_cpu": set(), "edgeattn.kernels_cuda": set()}
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")  # that kernels make use of


def common(kind: str, args: argparse.Namespace, model) -> dict:
    """The fields that all results share. args: of one setting (axes.expand); model: the runtime's Model."""
    return {"kind": kind, "model": model_name(model.config), "setting": axes.setting(args), "command": command(),
            "machine": machine(model.device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "edgeattn": version()}


@cache
def version() -> str:
    """Edgeattn's version and a digest of the code that computes, `0.1.0+3f2a9c1b`: other code makes other figures."""
    found = hashlib.sha256()
    for package, apart in CODE.items():  # in a wheel one folder holds all packages
        root = find_spec(package).submodule_search_locations[0]
        for folder, names, files in os.walk(root, followlinks=True):
            names[:] = sorted(set(names) - apart)
            for path in sorted(Path(folder, file) for file in files if file.endswith((".py", ".cu", ".cuh"))):
                found.update(f"{package} {path.relative_to(root)}\0".encode() + path.read_bytes())
    return f"{edgeattn.__version__}+{found.hexdigest()[:8]}"


def tell_versions(results: list[dict], where: str, what: str) -> None:
    """A line on stderr, if some results of a file are other versions'. what: becomes of them."""
    others = [result["edgeattn"] for result in results if result["edgeattn"] != version()]
    if others:
        print(f"{where}: {len(others)} of {len(results)} results are of other versions of edgeattn ({', '.join(sorted(set(others)))}; this "
              f"is {version()}): {what}", file=sys.stderr)


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


def ready(path: str | os.PathLike | None) -> None:
    """ValueError: no file of this name can be written, which nobody wants to hear after hours of measuring. None: nothing is to be."""
    if path and (not Path(path).resolve().parent.is_dir() or Path(path).is_dir()):
        raise ValueError(f"{path}: {'is a folder' if Path(path).is_dir() else 'no such folder'}; give the name of a file")


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
