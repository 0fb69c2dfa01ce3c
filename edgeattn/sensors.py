"""What this machine tells of its clocks, temperatures and power while something runs: Linux sysfs, and nvidia-smi for a GPU.

Kernel documentation: pm/cpufreq, power/powercap, hwmon/sysfs-interface, hwmon/ina3221, driver-api/thermal/sysfs-api. A sensor that is
not there gives None, and `missing` says why. Files are read below `root`, so that tests can bring a machine of their own.
"""
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeattn.sensors_smi import SMI, Smi
from edgeattn.sensors_sysfs import Sysfs, mean

INTERVAL = 0.2  # seconds between samples of what has no counter


@dataclass(frozen=True)
class Reading:
    """What was told during `seconds`: the mean of `mhz`, the least `mhz_min`, the highest `celsius`, energy in joules."""
    seconds: float
    mhz: float | None = None
    mhz_min: float | None = None
    celsius: float | None = None
    throttled: bool | None = None
    joules: float | None = None

    @property
    def watts(self) -> float | None:
        return None if self.joules is None or not self.seconds else self.joules / self.seconds


def merge(readings: list[Reading]) -> Reading:
    """Several stretches of time as if they were one."""
    known = all(one.joules is not None for one in readings)
    return Reading(sum(one.seconds for one in readings), _each(readings, "mhz", mean), _each(readings, "mhz_min", min),
                   _each(readings, "celsius", max), _each(readings, "throttled", any), _each(readings, "joules", sum) if known else None)


def _each(found, name, combine):
    values = [value for one in found if (value := getattr(one, name)) is not None]
    return combine(values) if values else None


class Sensors:
    """The sensors of the CPU, or of a GPU. Close it at the end.

    root     the folder that sys and proc are in
    gpu      read the GPU in use through nvidia-smi, where there is one; a Jetson's rails are in sysfs
    sources  {"frequency", "temperature", "throttling" or "power": where it is read}
    missing  {the others: why they are not}
    """

    def __init__(self, root: Path | str = "/", gpu: bool = False, smi: tuple[str, ...] = SMI):
        self._from = Smi.start(smi) if gpu else None
        self._from = self._from or Sysfs(Path(root))
        self.sources, self.missing = self._from.sources, {name: why for name, why in self._from.missing.items() if why}
        self._watched, self._closed, self._thread = None, threading.Event(), None
        if self._from.changes:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def _look(self):
        while not self._closed.wait(INTERVAL):
            if (watched := self._watched) is not None:
                watched.append((time.perf_counter(), self._from.sample()))

    def close(self) -> None:
        self._closed.set()
        if self._thread:
            self._thread.join()
        self._from.close()

    def watch(self) -> Callable[[], Reading]:
        """Begin to look; the function that this returns ends it and tells what was. One at a time."""
        samples, counts, energy, start = [], self._from.throttle_counts(), self._from.energy(), time.perf_counter()
        samples.append((start, self._from.sample()))
        self._watched = samples

        def stop() -> Reading:
            self._watched, end = None, time.perf_counter()
            used = self._from.used(energy, self._from.energy())
            samples.append((end, self._from.sample()))
            more = [after > before for before, after in zip(counts, self._from.throttle_counts())]
            looks = [sample for _, sample in samples]
            slowed = [*more, *(look.slowed for look in looks if look.slowed is not None)]
            return Reading(end - start, _each(looks, "mhz", mean), _each(looks, "mhz_min", min), _each(looks, "celsius", max),
                           any(slowed) if slowed else None, _integral(samples) if used is None else used)
        return stop


def _integral(samples):
    """Joules from watts at some moments; None where one of them tells nothing."""
    if any(sample.watts is None for _, sample in samples):
        return None
    return sum((b[0] - a[0]) * (a[1].watts + b[1].watts) / 2 for a, b in zip(samples, samples[1:]))
