"""What every result says of itself, whichever command made it: model, setting, command, machine, date, version."""
import argparse
import platform
import shlex
import sys
from datetime import datetime, timezone

import edgeattn
from edgeattn.apps import axes

FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm")  # that kernels make use of


def common(kind: str, args: argparse.Namespace, model) -> dict:
    """The fields that all results share. args: of one setting (axes.expand); model: the runtime's Model."""
    return {"kind": kind, "model": model_name(model.config), "setting": axes.setting(args), "command": command(),
            "machine": machine(model), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "edgeattn": edgeattn.__version__}


def command() -> str:
    """What the user typed."""
    return shlex.join(["edgeattn", *sys.argv[1:]])


def model_name(config: dict) -> str:
    """What people call an export, from its edgeattn.json: `nano int4`."""
    source = config.get("source", {})
    return f"{source.get('name') or source.get('folder') or 'unknown'} {config.get('precision', '')}".strip()


def machine(model) -> str:
    """Processor or GPU, cores, instructions, memory and system, in a line."""
    import psutil
    flags = _cpuinfo("flags", "Features").split()
    name = _cpuinfo("model name", "Model") or platform.processor() or platform.machine()
    features = " ".join(flag for flag in FEATURES if flag in flags)
    facts = [name, f"{psutil.cpu_count()} cores{f' ({features})' if features else ''}",
             f"{psutil.virtual_memory().total / 2**30:.1f} GiB", f"{platform.system()} {platform.release()}",
             f"Python {platform.python_version()}"]
    if model.device != "cpu":
        from edgeattn.kernels_cuda.device import about
        facts.insert(0, about()["name"])
    return ", ".join(facts)


def _cpuinfo(*names):
    """The first value of one of the names in /proc/cpuinfo; "" where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in file if ":" in line]))
    except OSError:
        found = {}
    return next((found[name] for name in names if name in found), "")
