"""Numba kernels for x86 and Arm CPUs: one operator a file, the same name as in the operator table.

Importing this package settles, before anything is compiled, which instructions the kernels use (LEVEL), what Numba compiles
for, its threading layer, and the folder of compiled kernels (CACHE_FOLDER). Numba by itself would not notice an edit of an
imported helper or another level, so the folder's name is a hash of everything that the machine code depends on.

    avx512    AVX-512 with VNNI         i8mm   Arm with 8-bit matrix products (and dot products)
    avxvnni   AVX2 with VEX-coded VNNI  neon   Arm with dot products
    avx2      AVX2, FMA, F16C           plain  whatever LLVM makes of it

EDGEATTN_SIMD=<level> forces a lower one, for tests; `edgeattn tune` chooses one that is faster here.
"""
import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numba
from numba.core import config

from edgeattn import device_profile
from edgeattn.private import private

# Best first; a level is available where the machine has all of its features.
NEEDS = {
    "x86": {"avx512": {"avx512vnni", "avx512vl", "avx512bw", "avx2", "fma", "f16c"},
            "avxvnni": {"avxvnni", "avx2", "fma", "f16c"}, "avx2": {"avx2", "fma", "f16c"}},
    "arm": {"i8mm": {"i8mm", "dotprod"}, "neon": {"dotprod"}},
}
# What a forced lower level compiles for, so that LLVM cannot use more than the level promises: CPU name, features.
LIMITS = {"avxvnni": ("haswell", "+avxvnni"), "avx2": ("haswell", ""), "plain": ("generic", "")}


ARM = llvm.get_process_triple().startswith(("aarch64", "arm64"))


def linux_arm_features(hwcap: int, hwcap2: int) -> set[str]:
    """Features that the kernel's AT_HWCAP and AT_HWCAP2 tell of: FPHP and ASIMDHP, ASIMDDP; I8MM."""
    bits = {"fullfp16": hwcap >> 9 & hwcap >> 10, "dotprod": hwcap >> 20, "i8mm": hwcap2 >> 13}
    return {name for name, bit in bits.items() if bit & 1}


def _unreported() -> set[str]:
    """Features of this machine that LLVM may not report: of /proc/cpuinfo it knows few names, of macOS none."""
    if ARM and sys.platform == "linux":
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
        return linux_arm_features(getauxval(16), getauxval(26))
    if ARM and sys.platform == "darwin":
        i8mm, size = ctypes.c_int(0), ctypes.c_size_t(4)
        ctypes.CDLL(None).sysctlbyname(b"hw.optional.arm.FEAT_I8MM", ctypes.byref(i8mm), ctypes.byref(size), None, ctypes.c_size_t(0))
        return {"dotprod", "i8mm"} if i8mm.value == 1 else {"dotprod"}  # every Apple chip that runs macOS has the first
    return set()


def compile_features(host: str, unreported: set[str]) -> str | None:
    """What Numba is to compile for: its own setting or choice (None), or the host's with those that LLVM does not report.

    Without them LLVM cannot select their instructions for a CPU that it only knows as "generic".
    """
    if not unreported or config.CPU_NAME is not None or config.CPU_FEATURES is not None:
        return config.CPU_FEATURES
    return ",".join(filter(None, [host, *(f"+{name}" for name in sorted(unreported))]))


def _features() -> set[str]:
    """Features of the machine that Numba compiles for."""
    if config.CPU_FEATURES is not None:
        return {f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+")}
    return {f for f, on in llvm.get_host_cpu_features().items() if on}


def available_levels() -> list[str]:
    """The levels that this machine can run, best first."""
    found = _features()
    return [level for level, needs in NEEDS["arm" if ARM else "x86"].items() if needs <= found] + ["plain"]


def _choose() -> str:
    levels, tuned = available_levels(), device_profile.read(PROFILE).get("level")
    level = os.environ.get("EDGEATTN_SIMD") or (tuned if tuned in levels else levels[0])
    if level not in levels:
        raise ValueError(f"EDGEATTN_SIMD must be one of {levels} on this machine, got {level!r}; unset it to use {levels[0]!r}")
    if level != levels[0] and level in LIMITS:
        config.CPU_NAME, config.CPU_FEATURES = LIMITS[level]
    return level


def cache_key(sources: Path, level: str) -> str:
    """Hash of all that compiled kernels depend on; `sources` is the folder of the kernels' Python files."""
    digest = hashlib.sha256()
    cpu = config.CPU_NAME or llvm.get_host_cpu_name()
    for text in (level, cpu, config.CPU_FEATURES or "", numba.__version__, llvmlite.__version__, platform.python_version()):
        digest.update(text.encode() + b"\0")
    for path in sorted(sources.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def cached_kernels() -> int:
    """How many compiled kernels the cache folder holds."""
    return sum(1 for _ in CACHE_FOLDER.rglob("*.nbc"))


config.CPU_FEATURES = compile_features(llvm.get_host_cpu_features().flatten(), _unreported())
PROFILE = device_profile.profile_path(cache_key(Path(__file__).parent, ""))  # what was measured with these kernels on this machine
LEVEL = _choose()
CACHE_FOLDER = device_profile.user_cache() / "edgeattn" / f"kernels-{cache_key(Path(__file__).parent, LEVEL)}"
config.CACHE_DIR = str(private(CACHE_FOLDER))
if not {"NUMBA_THREADING_LAYER", "NUMBA_THREADING_LAYER_PRIORITY"} & set(os.environ):
    # A parallel region costs 2 us with OpenMP and 50 to 130 us with Numba's own pool, which is left as the last resort.
    config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
