"""What was measured on this machine and holds for later runs: one small JSON file in the user's cache, beside the compiled kernels.

    level       instructions to compile for, where lower ones than the best were faster (`edgeattn tune`); null otherwise
    models      {a model's shape: {"threads", "ubatch"}}: what was faster than the defaults, for models of that shape alone
    crossovers  {what about: seconds}: from how many tokens on sparse attention pays (crossover.py)
    tuned       {a model's shape: what `edgeattn tune` measured}, for people

A file belongs to a machine, kernels and Python packages: others have another name, so that what is stale is not read.
"""
import hashlib
import json
import os
import platform
import sys
from pathlib import Path


def user_cache() -> Path:
    """Where this user's programs keep what can be made again."""
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        if os.environ.get(name):
            return Path(os.environ[name])
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")


def processor() -> str:
    """Its name, as far as the system tells."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.lower().startswith(("model name", "model\t"))]
        if names:
            return next((name for name in names if not name.isdigit()), platform.machine())
    return platform.processor() or platform.machine()


def profile_path(kernels: str) -> Path:
    """The profile of this machine. kernels: a hash of what compiled kernels depend on."""
    about = repr((kernels, processor(), os.cpu_count()))
    return user_cache() / "edgeattn" / f"device-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"


def read(path: Path) -> dict:
    """The profile; empty where there is none, or one that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def part(path: Path, name: str) -> dict:
    """A part of the profile that is itself {key: ...}; empty where there is none."""
    found = read(path).get(name)
    return found if isinstance(found, dict) else {}


def write(path: Path, profile: dict) -> None:
    """The file is replaced whole, or not at all: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        new.write_text(json.dumps(profile, indent=1), encoding="utf-8")
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def remember(path: Path, name: str, key: str, value) -> None:
    """Keep a value in a part of the profile. A cache that cannot be written is measured again; so is what another process writes at the
    same moment."""
    try:
        write(path, read(path) | {name: part(path, name) | {key: value}})
    except OSError:
        pass


def shape(config: dict) -> str:
    """What a model's settings are remembered under. config: its edgeattn.json."""
    about = config["model"]
    return f"{config['architecture']} {config['precision']}, {about['num_layers']} layers of {about['hidden_size']}"
