"""The kernel tests as an emulated Cortex-A76 (tests/arm64-python), as on a Raspberry Pi 5. In CI, where CI=true, only: minutes."""
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

TESTS = Path(__file__).parent
ARM = str(TESTS / "arm64-python")
PACKAGES = [f"numba=={numba.__version__}", "numpy", "psutil", "pytest"]
A76, A76_I8MM = "", "ARM64_FEATURES=+neon,+dotprod,+fullfp16,+i8mm "
PARTS = {  # run side by side, for two cores; what starts further processes cannot be emulated
    "nbits": [A76 + "{} tests/test_kernels.py -k 'nbits or ternary'",
              A76 + "{} tests/test_nbits.py tests/test_simd.py -k 'not level and not process and not cache'",
              A76_I8MM + "{} tests/test_kernels.py tests/test_simd.py -k 'matmul_nbits or ternary or instructions'"],
    "others": [A76 + "{} tests/test_kernels.py tests/test_floats.py -k 'not nbits and not ternary and not every'",
               A76 + "{} tests/test_attention.py -k 'batch and f16'",
               A76 + "{} tests/test_kv_attention.py -k 'read_as_they_are and (int8-kivi-64 or int4-kivi-64 or int3-hadamard-48)'"],
}
SECONDS = 2400  # about ten minutes on two quiet cores


@pytest.fixture(scope="module")
def emulator():
    if os.environ.get("CI") != "true":
        pytest.skip("runs in CI (CI=true)")
    if platform.machine() != "x86_64":
        pytest.skip("emulates Arm on x86-64 only")
    done = subprocess.run([ARM, "--setup", *PACKAGES], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"the emulator could not be set up: {done.stderr.strip()[-300:]}")


def start(part):
    commands = " && ".join(command.format(f"'{ARM}' -m pytest -q -x -p no:cacheprovider") for command in PARTS[part])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "EDGEATTN_", "XDG_"))}
    return subprocess.Popen(["bash", "-c", commands], cwd=TESTS.parent, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, start_new_session=True)


def test_kernels_as_cortex_a76(emulator):
    running, end = {part: start(part) for part in PARTS}, time.monotonic() + SECONDS
    try:
        for part, process in running.items():
            output, _ = process.communicate(timeout=max(1, end - time.monotonic()))
            assert process.returncode == 0, f"{part}: {output[-3000:]}"
    finally:
        for process in running.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the shell and the emulator
