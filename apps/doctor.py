"""edgeattn doctor: what this machine offers, what is missing, and how to get it."""
import argparse
import os
import platform
import sys
from importlib import metadata

HELP = "check this machine and installation; exit code 1 when something needed is missing"
NEEDED = ("numpy", "numba", "llvmlite", "onnx", "onnxruntime", "tokenizers", "safetensors", "jinja2", "psutil", "rich",
          "markdown-it-py", "pygments", "prompt_toolkit", "fastapi", "uvicorn", "llguidance")  # llvmlite: numba brings it
OPTIONAL = {"matplotlib": "draws the page of edgeattn report", "torch": "checks exports against the original model",
            "transformers": "needed by the tests only"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> int:
    missing = _packages()
    if "psutil" not in missing:
        missing += _machine()
    if not {"numpy", "numba", "llvmlite"} & set(missing):
        missing += _kernels()
        _gpu()
    print("\neverything needed is there" if not missing else f"\nmissing: {', '.join(missing)}")
    return 1 if missing else 0


def _line(name, value):
    print(f"{name:<18} {value}")


def _packages():
    import edgeattn
    _line("edgeattn", f"{edgeattn.__version__}, Python {platform.python_version()}, {platform.platform()}")
    missing = []
    for name in NEEDED:
        version = _version(name)
        if version is None:
            missing.append(name)
        _line(name, version or f"MISSING: {sys.executable} -m pip install {name}")
    for name, use in OPTIONAL.items():
        _line(name, _version(name) or f"not installed (optional; {use}): {sys.executable} -m pip install {name}")
    return missing


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine():
    import psutil
    from edgeattn.apps.models import cache_folder
    from edgeattn.apps.terminal import size
    from edgeattn.device_profile import processor
    memory = psutil.virtual_memory()
    _line("processor", f"{processor()}, {psutil.cpu_count(logical=False)} cores, {psutil.cpu_count()} threads")
    _line("memory", f"{size(memory.total)}, {size(memory.available)} available")
    folder = cache_folder()
    models = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    total = sum(f.stat().st_size for m in models for f in m.iterdir())
    _line("model cache", f"{folder}: {len(models)} models, {size(total)}")
    return _writable(folder)


def _writable(folder):
    """The folder, when it can be neither written nor made."""
    while not folder.exists():
        folder = folder.parent
    if os.access(folder, os.W_OK):
        return []
    _line("", f"MISSING: {folder} cannot be written; set XDG_CACHE_HOME to a folder of yours")
    return [f"a writable {folder}"]


def _kernels():
    import numba
    from edgeattn import kernels_cpu
    levels = kernels_cpu.available_levels()
    _line("instructions", f"{kernels_cpu.LEVEL} (this machine can: {', '.join(levels)})")
    if levels == ["plain"]:
        _line("", "no known dot-product instructions: models run, but slowly")
    layer, advice = _threading_layer()
    _line("threads", f"{numba.config.NUMBA_NUM_THREADS}, layer {layer or 'NONE'}")
    if advice:
        _line("", advice)
    _tuned(kernels_cpu.PROFILE)
    _line("kernel cache", f"{kernels_cpu.CACHE_FOLDER}: {kernels_cpu.cached_kernels()} kernels compiled")
    return ([] if layer else ["a threading layer"]) + _writable(kernels_cpu.CACHE_FOLDER)


def _tuned(path):
    """What `edgeattn tune` and sparse attention have measured here."""
    from edgeattn import device_profile
    found, chosen = device_profile.part(path, "tuned"), device_profile.part(path, "models")
    crossovers = len(device_profile.part(path, "crossovers"))
    _line("device profile", f"{path}: where sparse attention begins to pay, for {crossovers} settings" if path.is_file() else "none yet")
    if not found:
        _line("", "not tuned: edgeattn tune measures which threads and prompt chunks are fastest here")
    for shape, about in found.items():
        better = [f"{name} {value}" for name, value in chosen.get(shape, {}).items()]
        _line("", f"{shape}: {', '.join(better) or 'the defaults, which nothing beat'} (measured {about['date']})")
    if level := device_profile.read(path).get("level"):
        _line("", f"instructions {level}, which were faster than the best that this machine has")


def _gpu():
    """The GPU, or the one thing that is missing for --device cuda; no reason to fail."""
    from edgeattn.apps.terminal import size
    from edgeattn.devices import cuda_missing
    why = cuda_missing()
    if why:
        _line("GPU", f"none used: {why}")
        return
    from edgeattn.kernels_cuda.device import about
    found = about()
    memory = f"{size(found['memory_bytes'])}{' (shared with the CPU)' if found['integrated'] else ''}"
    mode = f", power mode {found['power_mode']}" if "power_mode" in found else ""
    _line("GPU", f"{found['name']}, compute capability {found['capability'] / 10:.1f}, {memory}, CUDA {found['driver_cuda']} driver, "
          f"CuPy {found['cupy']}{mode}")


def _threading_layer():
    """Numba's layer, found by starting it, and what to do for a faster one."""
    import numba
    from edgeattn.kernels_cpu import steps  # starts the layer
    assert steps
    try:
        layer = numba.threading_layer()
    except ValueError:
        return None, f"MISSING: no threading layer starts; {sys.executable} -m pip install tbb, or the system's libgomp"
    slow = "slow (50 us a parallel step instead of 2): install OpenMP, on Debian `apt install libgomp1`, on macOS `brew install libomp`"
    return layer, slow if layer == "workqueue" else None
