"""Clocks, temperature, throttling and power of an NVIDIA GPU as nvidia-smi prints them."""
import os
import subprocess
import sys
import threading

from edgeattn.sensors_sysfs import Sample

KINDS = ("frequency", "temperature", "throttling", "power")
SLOWED = 0x08 | 0x20 | 0x40 | 0x80  # bits of clocks_throttle_reasons.active: slowed by the hardware, by heat (two), by the power brake
SMI = ("nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu,clocks_throttle_reasons.active,power.draw", "--format=csv,noheader,nounits",
       "-lms", "200")


def in_use() -> str:
    """The GPU that computes here, as nvidia-smi is told (-i): its PCI address where CuPy is loaded, or else the first that CUDA may see,
    whose numbers are nvidia-smi's only if CUDA_DEVICE_ORDER says so."""
    if (cupy := sys.modules.get("cupy")) is not None:
        return cupy.cuda.runtime.deviceGetPCIBusId(cupy.cuda.Device().id)
    return os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip() or "0"


class Smi:
    """A GPU, of which nvidia-smi prints a line five times a second."""
    sources, missing, changes = dict.fromkeys(KINDS, "nvidia-smi"), {}, True

    def __init__(self, process, first):
        self._process, self._last = process, first
        threading.Thread(target=self._read, daemon=True).start()

    @classmethod
    def start(cls, command) -> "Smi | None":
        """None where nvidia-smi is not there, or knows nothing of the GPU, as on a Jetson."""
        try:
            process = subprocess.Popen([*command, "-i", in_use()], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return None
        first = _parse(process.stdout.readline())
        if first.watts is not None:
            return cls(process, first)
        process.kill()
        process.wait()
        return None

    def _read(self):
        for line in self._process.stdout:
            self._last = _parse(line)

    def sample(self) -> Sample:
        return self._last

    def throttle_counts(self) -> list[float]:
        return []

    def energy(self):
        return None

    def used(self, before, after):
        return None

    def close(self):
        self._process.kill()
        self._process.wait()


def _parse(line):
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != 4:
        return Sample()
    mhz, celsius, watts = (float(cell) if cell.replace(".", "", 1).isdigit() else None for cell in (cells[0], cells[1], cells[3]))
    slowed = bool(int(cells[2], 16) & SLOWED) if cells[2].startswith("0x") else None
    return Sample(mhz, mhz, celsius, slowed, watts)
