"""The GPU at hand: CuPy, or one line that says what is missing."""
import ctypes
import shutil
import subprocess
import sys
from functools import cache

EXTRAS = {12: "cuda12", 13: "cuda13"}  # of the package, by the CUDA version whose CuPy it installs


@cache
def driver():
    """The driver's library; ValueError when this machine has none."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        raise ValueError(f"no NVIDIA driver was found ({name}); install one, or run on the CPU with --device cpu") from None
    if library.cuInit(0):
        raise ValueError("the NVIDIA driver found no GPU that it can use; check nvidia-smi, or run on the CPU with --device cpu")
    return library


def driver_version() -> tuple[int, int]:
    """The newest CUDA that the driver runs, as (major, minor)."""
    found = ctypes.c_int()
    driver().cuDriverGetVersion(ctypes.byref(found))
    return found.value // 1000, found.value % 1000 // 10


@cache
def cupy():
    """The module cupy; ValueError, in one line, when it is not there or does not fit the driver."""
    major, minor = driver_version()
    wanted = f"pip install 'edgeattn[{EXTRAS.get(min(major, max(EXTRAS)), 'cuda12')}]'"
    if major < min(EXTRAS):
        raise ValueError(f"the NVIDIA driver runs CUDA {major}.{minor}, CuPy needs {min(EXTRAS)} or newer: update the driver")
    try:
        import cupy as module
    except ImportError as error:
        missing = getattr(error, "name", None) == "cupy"
        why = "CuPy is not installed" if missing else f"CuPy does not import ({str(error).strip().splitlines()[0]})"
        raise ValueError(f"{why}; {wanted} (the driver runs CUDA {major}.{minor})") from None
    built = module.cuda.runtime.runtimeGetVersion() // 1000
    if built > major:
        raise ValueError(f"CuPy is built for CUDA {built}, the driver runs {major}.{minor} at most; "
                         f"pip uninstall cupy-cuda{built}x, then {wanted}")
    return module


def capability() -> int:
    """The device's compute capability: 87 is 8.7."""
    return int(cupy().cuda.Device().compute_capability)


@cache
def about() -> dict:
    """What a measurement has to say about the device: name, capability, memory, processors, highest clocks, versions."""
    module = cupy()
    runtime, device = module.cuda.runtime, module.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)

    def attribute(number):  # cudaDeviceAttr
        return runtime.deviceGetAttribute(number, device.id)
    found = {"name": properties["name"].decode(), "capability": capability(), "memory_bytes": properties["totalGlobalMem"],
             "processors": properties["multiProcessorCount"], "l2_bytes": properties["l2CacheSize"], "shared_bytes": attribute(97),
             "clock_mhz": attribute(13) // 1000, "memory_clock_mhz": attribute(36) // 1000, "memory_bus_bits": attribute(37),
             "integrated": bool(attribute(18)), "driver_cuda": "{}.{}".format(*driver_version()), "cupy": module.__version__}
    if mode := power_mode():
        found["power_mode"] = mode
    return found


def power_mode() -> str:
    """What a Jetson's nvpmodel is set to; empty elsewhere."""
    if not shutil.which("nvpmodel"):
        return ""
    answer = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, check=False)
    return " ".join(answer.stdout.split())
