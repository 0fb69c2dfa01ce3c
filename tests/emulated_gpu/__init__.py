"""The CUDA kernels without a GPU: their sources, compiled for this CPU, in place of the device's code (cuda.h says how).

install() makes kernels_cuda believe in a GPU; g++ compiles each source once. Linux on x86-64 only: fibers switch in assembly.
"""
import ctypes
import hashlib
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import imitated_gpu
import numpy as np
from emulated_gpu.translate import translate

HERE = Path(__file__).parent
COMPILER = "g++", "-std=c++17", "-O1", "-w", "-x", "c++", "-fno-strict-aliasing", "-ffp-contract=off", \
    "-fno-gnu-unique"  # each library has variables of its own
ALIGNED = "-fsanitize=alignment"  # what is found goes to cuda.h
ABOUT = dict(name="emulation", capability=87, processors=8, shared_bytes=163 << 10, integrated=False, memory_clock_mhz=1, memory_bus_bits=1,
             clock_mhz=1, l2_bytes=1 << 20, memory_bytes=1 << 30, driver_cuda="none", cupy="none")  # an Orin's limits
ATTRIBUTES = {"MultiProcessorCount": ABOUT["processors"], "MaxSharedMemoryPerMultiprocessor": 164 << 10}


def missing() -> str:
    """Why kernels cannot be emulated here; empty where they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "emulates CUDA kernels on Linux x86-64 only"
    return "" if shutil.which("g++") else "g++ is not installed"


@cache
def _library(name):
    from edgeattn.kernels_cuda import compile
    text = f'#include "cuda.h"\n#include "ptx.h"\n{translate(compile.source(name))}'
    headers = "".join((HERE / header).read_text() for header in ("cuda.h", "ptx.h"))
    key = hashlib.sha256((text + headers + str(COMPILER) + ALIGNED).encode()).hexdigest()[:16]
    made = compile._cache_folder() / "cuda" / f"{name}-emulated-{key}.so"
    if not made.is_file():
        made.parent.mkdir(parents=True, exist_ok=True)
        gangs = ["-DEMULATED_GANGS"] if "struct Exchange" in text else []
        plain = _run(["-E", "-P", *gangs, f"-I{HERE}", "-"], text)
        kernels = re.findall(r'extern\s*"C"\s*void\s+(\w+)\s*\(', plain)
        entries = "".join(f'extern "C" void entry_{k}(void** arguments) {{ emulated::call({k}, arguments); }}\n' for k in kernels
                          if not k.startswith(("emulated_", "__")))
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:
            _run([ALIGNED, "-shared", "-fPIC", "-pthread", "-mtls-dialect=gnu2", "-o", f"{folder}/made.so", "-"], plain + entries)
            Path(folder, "made.so").rename(made)
    return ctypes.CDLL(str(made))


def _run(arguments, text):
    done = subprocess.run([*COMPILER, *arguments], input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated kernels do not compile:\n{done.stderr[:3000]}")
    return done.stdout


def _function(name, kernel, shared=0):
    library = _library(name)
    return SimpleNamespace(library=library, entry=getattr(library, f"entry_{kernel}"), name=kernel)


def _launch(launch, stream):
    held = [np.asarray(x) for x in launch.args]
    arguments = (ctypes.c_void_p * len(held))(*(x.ctypes.data for x in held))
    function = launch.function
    sizes = map(int, (*launch.grid, launch.block, launch.shared, launch.gang))
    if function.library.emulated_launch(function.entry, *sizes, arguments):
        raise RuntimeError(f"a block that no GPU takes: {launch}")


def _gangs_at_once(launch):
    from edgeattn.kernels_cuda import attention_call
    processor = ATTRIBUTES["MaxSharedMemoryPerMultiprocessor"]
    return attention_call.processors() * (processor // (launch.shared + 1024)) // launch.gang


class _Graph:
    """steps.Graph: the same launches again."""

    def __init__(self, launches, stream=None):
        self.launches, self.stream = launches, stream or imitated_gpu.Stream()

    def launch(self, stream=None):
        for launch in self.launches:
            _launch(launch, 0)


def install() -> None:
    """From now on launches of this process run on the CPU. Behind what tests patch for a while, this stays."""
    from edgeattn.kernels_cuda import attention_call, cached_attention, compile, device, steps
    module = imitated_gpu.cupy()
    device.cupy, device.about, device.capability = lambda: module, lambda: ABOUT, lambda: ABOUT["capability"]
    compile.function, steps._launch, steps.Graph = _function, _launch, _Graph
    for asking in (attention_call, cached_attention):
        asking.attribute = ATTRIBUTES.__getitem__
    cached_attention.gangs_at_once = _gangs_at_once
