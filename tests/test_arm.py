"""The kernel tests as an emulated Cortex-A76 (tests/arm64-python), as on a Raspberry Pi 5. In CI, where CI=true, only: minutes."""
import os
import platform
import subprocess
import sys
from pathlib import Path

import numba
import pytest

TESTS = Path(__file__).parent
ARM = str(TESTS / "arm64-python")
PACKAGES = [f"numba=={numba.__version__}", "numpy", "pytest"]
PARTS = {  # run side by side, for two cores; what starts further processes cannot be emulated
    "nbits": [["tests/test_kernels.py", "-k", "nbits"], ["tests/test_nbits.py", "tests/test_simd.py", "-k", "not level and not process and not cache"]],
    "others": [["tests/test_kernels.py", "-k", "not nbits and not every"]],
}
SECONDS = 540


@pytest.fixture(scope="module")
def emulator():
    if os.environ.get("CI") != "true":
        pytest.skip("runs in CI (CI=true)")
    if platform.machine() != "x86_64":
        pytest.skip("emulates Arm on x86-64 only")
    done = subprocess.run([ARM, "--setup", *PACKAGES], env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the emulator could not be set up: {done.stderr.strip()[-300:]}")


def start(part):
    commands = " && ".join(f"{ARM} -m pytest -q -x -p no:cacheprovider " + " ".join(f"'{word}'" for word in words) for words in PARTS[part])
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "EDGEATTN_", "XDG_"))}
    return subprocess.Popen(["bash", "-c", commands], cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_kernels_as_cortex_a76(emulator):
    running = {part: start(part) for part in PARTS}
    for part, process in running.items():
        try:
            output, _ = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
        assert process.returncode == 0, f"{part}: {output[-3000:]}"
