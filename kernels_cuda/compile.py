"""CUDA sources to machine code, by NVRTC: on the device at hand, or for any target with no GPU and no driver.

EDGEATTN_CUDA_ARCH=compute_80 makes PTX for that architecture, which the driver translates: so the code that an older GPU runs is run
on a newer one.
"""
import ctypes
import hashlib
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgeattn.kernels_cuda import device

TARGETS = (80, 86, 87, 89, 90, 120)
HERE = Path(__file__).parent
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
OPTIONS = ("-std=c++17", "--ptxas-options=-v")  # no fast math: kernels write __expf where they mean it


def source(name: str) -> str:
    """The text of <name>.cu with each .cuh it includes in its place, once."""
    seen = set()

    def read(file):
        seen.add(file)
        return "".join(insert(line) for line in (HERE / file).read_text().splitlines(keepends=True))

    def insert(line):
        found = re.match(r'\s*#include "(\w+\.cuh)"', line)
        if found is None:
            return "" if line.startswith("#pragma once") else line
        return "" if found[1] in seen else read(found[1])
    return read(f"{name}.cu")


class _Bindings:
    """NVRTC by NVIDIA's own Python package: needs no GPU and no driver."""

    def __init__(self):
        from cuda.bindings import nvrtc
        self._nvrtc = nvrtc
        self.version = "{}.{}".format(*nvrtc.nvrtcVersion()[1:])

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        rtc = self._nvrtc
        program = rtc.nvrtcCreateProgram(text.encode(), name.encode(), 0, [], [])[1]
        failed = rtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])[0]
        log = bytearray(rtc.nvrtcGetProgramLogSize(program)[1])
        rtc.nvrtcGetProgramLog(program, log)
        log = log.decode().strip("\0 \n")
        if int(failed):
            raise RuntimeError(f"{name} does not compile with {' '.join(options)}:\n{log}")
        kind = "PTX" if options[0].startswith("-arch=compute") else "CUBIN"
        made = bytearray(getattr(rtc, f"nvrtcGet{kind}Size")(program)[1])
        getattr(rtc, f"nvrtcGet{kind}")(program, made)
        rtc.nvrtcDestroyProgram(program)
        return bytes(made), log


class _CuPy:
    """NVRTC by CuPy's binding."""

    def __init__(self):
        from cupy_backends.cuda.libs import nvrtc
        self._nvrtc = nvrtc
        self.version = "{}.{}".format(*nvrtc.getVersion())

    def compile(self, text: str, name: str, options: tuple[str, ...]) -> tuple[bytes, str]:
        rtc = self._nvrtc
        program = rtc.createProgram(text, name, (), ())
        try:
            rtc.compileProgram(program, options)
        except rtc.NVRTCError:
            raise RuntimeError(f"{name} does not compile with {' '.join(options)}:\n{rtc.getProgramLog(program)}") from None
        made = rtc.getPTX(program) if options[0].startswith("-arch=compute") else rtc.getCUBIN(program)
        log = rtc.getProgramLog(program)
        rtc.destroyProgram(program)
        return made, log


@cache
def _nvrtc(of_cupy: bool):
    """For the device at hand CuPy's NVRTC, which device.cupy() has found to fit the driver; a newer one's code may not load."""
    if of_cupy:
        return _CuPy()
    try:
        return _Bindings()
    except ImportError:
        return _CuPy()


def build(name: str, target: int | str, of_cupy: bool = False) -> tuple[bytes, str]:
    """(cubin, ptxas's report) of <name>.cu for a compute capability such as 87, or (PTX, log) for "compute_80"."""
    arch = target if isinstance(target, str) else f"sm_{target}"
    return _nvrtc(of_cupy).compile(source(name), f"{name}.cu", (f"-arch={arch}", *OPTIONS))


def report(log: str) -> dict[str, dict[str, int]]:
    """{kernel: registers, stack bytes, spill_bytes, shared bytes} out of what build() gives as log."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        def number(pattern):
            match = re.search(pattern, part)
            return int(match[1]) if match else 0
        found[part.split("'")[0]] = {
            "registers": number(r"Used (\d+) registers"), "stack": number(r"(\d+) bytes stack frame"),
            "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"), "shared": number(r"(\d+) bytes smem")}
    return found


def _cache_folder() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "edgeattn"
    return (Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")) / "edgeattn"


def _built(name: str, target: int | str) -> bytes:
    """build()'s code, kept on disk under a hash of all that it depends on."""
    text = "\0".join((source(name), str(target), *OPTIONS, _nvrtc(True).version))
    path = _cache_folder() / "cuda" / f"{name}-{target}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if path.is_file():
        return path.read_bytes()
    code = build(name, target, of_cupy=True)[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:  # another process may be at it
        file.write(code)
    os.replace(file.name, path)
    return code


def forced_target() -> str:
    """"compute_80" where EDGEATTN_CUDA_ARCH asks for it; empty: the device's own machine code."""
    return os.environ.get("EDGEATTN_CUDA_ARCH", "")


@cache
def module(name: str):
    """<name>.cu as a loaded module of the device at hand: module(name).get_function(kernel)."""
    target = forced_target() or device.capability()
    loaded = device.cupy().cuda.function.Module()
    loaded.load(_built(name, target))
    return loaded


@dataclass(frozen=True)
class Function:
    """A kernel and the driver's handle of it, which is good as long as its module is loaded: module() holds that."""
    name: str
    ptr: int


@cache
def _function(name: str, kernel: str):
    """A kernel of <name>.cu, and the dynamic shared memory that it is allowed so far: 48 KiB less what it may have declared itself."""
    return Function(kernel, module(name).get_function(kernel).ptr), [40 << 10]


def function(name: str, kernel: str, shared: int = 0) -> Function:
    """A kernel of <name>.cu, which may be launched with `shared` bytes of dynamic shared memory."""
    found, allowed = _function(name, kernel)
    if shared > allowed[0]:
        status = device.driver().cuFuncSetAttribute(ctypes.c_void_p(found.ptr), MAX_DYNAMIC_SHARED, shared)
        if status:
            raise ValueError(f"{name}.{kernel} needs {shared} bytes of shared memory for a block, which this device lacks "
                             f"(CUDA error {status})")
        allowed[0] = shared
    return found
