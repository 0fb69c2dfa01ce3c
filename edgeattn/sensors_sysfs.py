"""Clocks, temperatures, throttling and power as Linux tells them in sysfs: x86, Arm boards, Jetson."""
import re
from dataclasses import dataclass
from pathlib import Path

INPUTS = ("VDD_IN", "POM_5V_IN", "VIN")  # a Jetson's rails through which all power comes; a board without: the sum of its rails
COOLING = re.compile(r"(thermal-)?(cpu|dev)freq|Processor|.*throttle-alert")  # cooling devices that slow something down, no fans


@dataclass(frozen=True)
class Sample:
    """One look: MHz on average over cores and of the slowest, degrees Celsius of the hottest sensor, whether heat or power hold clocks
    down, watts."""
    mhz: float | None = None
    mhz_min: float | None = None
    celsius: float | None = None
    slowed: bool | None = None
    watts: float | None = None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _text(path):
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path):
    """None for a sensor that does not answer: some fail with an error, others write nothing."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


class Sysfs:
    """The files of one machine."""

    def __init__(self, root: Path):
        self._cores = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._cpuinfo = root / "proc/cpuinfo"
        zones = sorted(root.glob("sys/class/thermal/thermal_zone*/temp"))
        monitors = sorted(root.glob("sys/class/hwmon/hwmon*"))
        self._heat = [path for path in (*zones, *(p for m in monitors for p in sorted(m.glob("temp*_input")))) if _number(path) is not None]
        self._counts = sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"))
        self._cooling = [path / "cur_state" for path in sorted(root.glob("sys/class/thermal/cooling_device*"))
                         if COOLING.match(_text(path / "type"))]
        self._counters = self._watts = None
        power = self._find_power(root, monitors)
        self.sources = {name: source for name, source in (
            ("frequency", "cpufreq" if self._cores else "/proc/cpuinfo" if self._mhz() else ""),
            ("temperature", ", ".join(sorted({_text(p.parent / "type") or _text(p.parent / "name") for p in self._heat}))),
            ("throttling", " and ".join(name for name, found in (("thermal_throttle", self._counts), ("cooling devices", self._cooling))
                                        if found)), ("power", power if self._counters or self._watts else "")) if source}
        self.missing = {name: "" if name in self.sources else why for name, why in (
            ("frequency", "no cpufreq"), ("temperature", "no thermal zone, no hwmon"),
            ("throttling", "no thermal_throttle, no cooling device"), ("power", power))}
        self.changes = bool(self._cores or self._heat or self._cooling or self._watts)

    def _find_power(self, root, monitors):
        """Sets how power is read, and says from where, or why it cannot be."""
        # not intel-rapl-mmio:*, through which laptops tell the same package's energy once more
        zones = [z for z in sorted(root.glob("sys/class/powercap/intel-rapl:*")) if _text(z / "name").startswith(("package", "dram"))]
        if zones and all(_number(z / "energy_uj") is not None for z in zones):
            self._counters = [(z / "energy_uj", (_number(z / "max_energy_range_uj") or 0)) for z in zones]
            return "RAPL: " + ", ".join(_text(z / "name") for z in zones)
        rails = {rail: pair for m in monitors if _text(m / "name") == "ina3221" for rail, pair in _rails(m)}
        rails = {name: pair for name, pair in rails.items() if name in INPUTS} or rails
        if rails:
            self._watts = lambda: [1e-6 * volts * amps for volts, amps in _pairs(rails.values())]
            return f"INA3221: {', '.join(rails)}"
        older = {_text(path): path.parent / f"in_power{path.name[-1]}_input"
                 for path in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*"))}
        older = {name: path for name, path in older.items() if name in INPUTS} or older
        if older:
            self._watts = lambda: [1e-3 * value for value in map(_number, older.values()) if value is not None]
            return f"INA3221: {', '.join(older)}"
        if found := [path for m in monitors for path in _hwmon(m, "energy")]:
            self._counters = [(path, 0) for path in found]
            return f"hwmon: {', '.join(sorted({_text(path.parent / 'name') for path in found}))}"
        if found := [path for m in monitors for path in _hwmon(m, "power")]:
            self._watts = lambda: [1e-6 * value for value in map(_number, found) if value is not None]
            return f"hwmon: {', '.join(sorted({_text(path.parent / 'name') for path in found}))}"
        return "RAPL may be read by root only" if zones else "no RAPL, hwmon or INA3221 sensor"

    def _mhz(self):
        if self._cores:
            return [1e-3 * value for value in map(_number, self._cores) if value is not None]
        return [float(line.split(":")[1]) for line in _text(self._cpuinfo).splitlines() if line.startswith("cpu MHz")]

    def sample(self) -> Sample:
        mhz, heat = self._mhz(), [value for value in map(_number, self._heat) if value is not None]
        held = [value > 0 for value in map(_number, self._cooling) if value is not None]
        watts = self._watts and self._watts()
        return Sample(mean(mhz) if mhz else None, min(mhz, default=None), max(heat) / 1000 if heat else None,
                      any(held) if held else None, sum(watts) if watts else None)

    def throttle_counts(self) -> list[float]:
        return [_number(path) or 0 for path in self._counts]

    def energy(self):
        """Microjoules of each counter."""
        return self._counters and [_number(path) for path, _ in self._counters]

    def used(self, before, after):
        """Joules between two calls of energy(): a counter that fell has begun anew once."""
        if not self._counters or None in (*before, *after):
            return None
        return 1e-6 * sum(b - a if b >= a else b - a + limit for a, b, (_, limit) in zip(before, after, self._counters))

    def close(self):
        pass


def _rails(monitor):
    """(rail, its files of millivolts and milliamperes); in7 is a sum of shunts, no rail."""
    for path in sorted(monitor.glob("in[1-6]_label")):
        amps = monitor / f"curr{path.name[2]}_input"
        if amps.exists() and _text(path) not in ("", "NC"):
            yield _text(path), (monitor / f"in{path.name[2]}_input", amps)


def _pairs(files):
    found = [(_number(volts), _number(amps)) for volts, amps in files]
    return [pair for pair in found if None not in pair]


def _hwmon(monitor, what):
    """Files of energy or power; only sums or sockets, where a driver has those beside their parts. GPUs' own do not count."""
    if _text(monitor / "name") in ("amdgpu", "nouveau", "i915", "xe"):
        return []
    found = sorted({path.name.partition("_")[0]: path for kind in ("average", "input") for path in monitor.glob(f"{what}*_{kind}")
                    if _number(path) is not None}.values())
    named = [path for path in found if "total" in (label := _text(path.with_name(path.name.partition("_")[0] + "_label")).lower())
             or "socket" in label]
    return named or found
