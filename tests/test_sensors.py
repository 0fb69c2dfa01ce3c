"""Sensors, each on a tree of files as a machine that has it shows them."""
import sys
import time
from types import SimpleNamespace

import pytest

from edgeattn import sensors_smi
from edgeattn.sensors import Reading, Sensors, merge

CPU = "sys/devices/system/cpu"


@pytest.fixture
def machine(tmp_path):
    """write(files): what /sys and /proc show; read(): a Reading, during which `change` is written."""
    class Machine:
        root = tmp_path

        def write(self, files):
            for name, text in files.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(f"{text}\n")

        def read(self, change={}, wait=0.0, **options):
            sensors = Sensors(tmp_path, **options)
            stop = sensors.watch()
            time.sleep(wait)
            self.write(change)
            reading = stop()
            sensors.close()
            return sensors, reading
    return Machine()


def test_a_machine_without_sensors(machine):
    sensors, reading = machine.read()
    assert sensors.sources == {} and "no RAPL" in sensors.missing["power"] and len(sensors.missing) == 4
    assert (reading.mhz, reading.celsius, reading.throttled, reading.joules, reading.watts) == (None,) * 5 and reading.seconds > 0


def test_clocks_from_cpufreq(machine):
    machine.write({f"{CPU}/cpu0/cpufreq/scaling_cur_freq": 2400000, f"{CPU}/cpu1/cpufreq/scaling_cur_freq": 1200000,
                   "proc/cpuinfo": "cpu MHz : 999.0"})
    sensors, reading = machine.read({f"{CPU}/cpu1/cpufreq/scaling_cur_freq": 600000})
    assert sensors.sources["frequency"] == "cpufreq" and (reading.mhz, reading.mhz_min) == (1650, 600)


def test_clocks_of_a_virtual_machine(machine):
    machine.write({"proc/cpuinfo": "processor : 0\ncpu MHz\t\t: 2596.1\n\nprocessor : 1\ncpu MHz\t\t: 2000.1"})
    sensors, reading = machine.read()
    assert sensors.sources == {"frequency": "/proc/cpuinfo"} and reading.mhz == pytest.approx(2298.1)


def test_the_hottest_sensor(machine):
    machine.write({"sys/class/thermal/thermal_zone0/temp": 41000, "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
                   "sys/class/thermal/thermal_zone1/temp": "", "sys/class/thermal/thermal_zone1/type": "broken",
                   "sys/class/hwmon/hwmon0/name": "k10temp", "sys/class/hwmon/hwmon0/temp1_input": 52500})
    sensors, reading = machine.read({"sys/class/thermal/thermal_zone0/temp": 71000})
    assert reading.celsius == 71 and sensors.sources["temperature"] == "cpu-thermal, k10temp"


def test_throttling_that_was_counted(machine):
    machine.write({f"{CPU}/cpu{i}/thermal_throttle/{what}_throttle_count": 5 for i in range(2) for what in ("core", "package")})
    assert machine.read()[1].throttled is False  # before we began
    assert machine.read({f"{CPU}/cpu1/thermal_throttle/core_throttle_count": 6})[1].throttled is True


@pytest.mark.parametrize("kind, state, throttled", [("cpufreq-cpu0", 0, False), ("cpufreq-cpu0", 3, True), ("pwm-fan", 3, None),
                                                    ("Processor", 1, True), ("gpu-throttle-alert", 1, True)])
def test_throttling_by_a_cooling_device(machine, kind, state, throttled):
    machine.write({"sys/class/thermal/cooling_device0/type": kind, "sys/class/thermal/cooling_device0/cur_state": state})
    assert machine.read()[1].throttled is throttled


def rapl(package, dram=1_000_000):
    zones = {"intel-rapl:0": ("package-0", package), "intel-rapl:0:0": ("core", 77), "intel-rapl:0:1": ("dram", dram),
             "intel-rapl:1": ("psys", 99), "intel-rapl-mmio:0": ("package-0", package)}
    return {f"sys/class/powercap/{zone}/{name}": value for zone, (kind, energy) in zones.items()
            for name, value in (("name", kind), ("energy_uj", energy), ("max_energy_range_uj", 262_143_000_000))}


@pytest.mark.parametrize("before, after, joules", [(1_000_000, 9_500_000, 10), (262_142_000_000, 7_500_000, 10)])
def test_rapl(machine, before, after, joules):
    machine.write(rapl(before))
    sensors, reading = machine.read(rapl(after, 2_500_000))
    assert reading.joules == pytest.approx(joules) and sensors.sources["power"] == "RAPL: package-0, dram"
    assert reading.watts == pytest.approx(joules / reading.seconds)


def test_rapl_that_only_root_may_read(machine):
    machine.write(rapl(1))
    (machine.root / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    sensors, reading = machine.read()
    assert reading.joules is None and "root" in sensors.missing["power"]


def jetson(rails):
    files = {"sys/class/hwmon/hwmon3/name": "ina3221", "sys/class/hwmon/hwmon3/in7_label": "sum of shunt voltages",
             "sys/class/hwmon/hwmon3/in7_input": 9999}
    for i, (rail, volts, amps) in enumerate(rails, 1):
        files |= {f"sys/class/hwmon/hwmon3/in{i}_label": rail, f"sys/class/hwmon/hwmon3/in{i}_input": volts,
                  f"sys/class/hwmon/hwmon3/curr{i}_input": amps}
    return files


@pytest.mark.parametrize("rails, watts", [
    ([("VDD_IN", 5000, 1200), ("VDD_CPU_GPU_CV", 5000, 400), ("VDD_SOC", 5000, 200)], 6),                # Orin Nano: all comes through one
    ([("VDD_GPU_SOC", 20000, 100), ("VDD_CPU_CV", 20000, 200), ("VIN_SYS_5V0", 5000, 400)], 8)])         # AGX Orin
def test_rails_of_a_jetson(machine, rails, watts):
    machine.write(jetson(rails))
    sensors, reading = machine.read(wait=0.05)
    assert reading.watts == pytest.approx(watts, rel=0.01) and sensors.sources["power"].startswith("INA3221: ")


def test_rails_of_an_older_jetson(machine):
    folder = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    machine.write({f"{folder}/rail_name_0": "POM_5V_IN", f"{folder}/in_power0_input": 4321, f"{folder}/rail_name_1": "POM_5V_GPU",
                   f"{folder}/in_power1_input": 999})
    assert machine.read(wait=0.05)[1].watts == pytest.approx(4.321, rel=0.01)


def test_power_of_hwmon(machine):
    monitor = "sys/class/hwmon/hwmon"
    machine.write({f"{monitor}0/name": "amdgpu", f"{monitor}0/power1_average": 50_000_000,
                   f"{monitor}1/name": "ina226", f"{monitor}1/power1_input": 3_000_000})
    sensors, reading = machine.read(wait=0.05)
    assert reading.watts == pytest.approx(3, rel=0.01) and sensors.sources["power"] == "hwmon: ina226"


def test_energy_of_hwmon(machine):
    monitor = "sys/class/hwmon/hwmon0"
    machine.write({f"{monitor}/name": "amd_energy", f"{monitor}/energy1_label": "Ecore000", f"{monitor}/energy1_input": 5,
                   f"{monitor}/energy2_label": "Esocket0", f"{monitor}/energy2_input": 1_000_000})
    assert machine.read({f"{monitor}/energy1_input": 99_000_000, f"{monitor}/energy2_input": 4_000_000})[1].joules == pytest.approx(3)


def test_watts_are_sampled_in_between(machine):
    machine.write(jetson([("VDD_IN", 5000, 1000)]))
    sensors = Sensors(machine.root)
    stop = sensors.watch()
    machine.write(jetson([("VDD_IN", 5000, 3000)]))
    while len(sensors._watched) < 3:
        time.sleep(0.02)
    machine.write(jetson([("VDD_IN", 5000, 1000)]))
    reading = stop()
    sensors.close()
    assert reading.watts > 6  # the ends alone would tell 5


def smi(tmp_path, lines):
    """A program that prints lines as nvidia-smi -lms does, and stays."""
    script = tmp_path / "smi.py"
    script.write_text(f"import sys, time\nfor line in {lines!r}:\n    print(line.format(*sys.argv[1:]), flush=True)\ntime.sleep(60)\n")
    return sys.executable, str(script)


def test_a_gpu(machine):
    sensors, reading = machine.read(gpu=True, smi=smi(machine.root, ["1980, 45, 0x0000000000000000, 310.50"]), wait=0.05)
    assert (reading.mhz, reading.celsius, reading.throttled) == (1980, 45, False) and reading.watts == pytest.approx(310.5, rel=0.01)
    assert set(sensors.sources.values()) == {"nvidia-smi"} and not sensors.missing
    assert machine.read(gpu=True, smi=smi(machine.root, ["900, 91, 0x0000000000000040, 100.0"]))[1].throttled is True


@pytest.mark.parametrize("visible, mhz", [(None, 0), ("", 0), ("3", 3), ("2,0", 2)])
def test_the_gpu_in_use_is_asked(machine, monkeypatch, visible, mhz):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    asked = smi(machine.root, ["{1}, 45, 0x0000000000000000, 310.50"])  # what follows -i
    assert machine.read(gpu=True, smi=asked)[1].mhz == mhz
    runtime = SimpleNamespace(deviceGetPCIBusId=lambda number: f"000{number}:1B:00.0")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=lambda: SimpleNamespace(id=1))))
    assert sensors_smi.in_use() == "0001:1B:00.0"  # it knows best


def test_a_gpu_that_nvidia_smi_does_not_know(machine):
    machine.write(jetson([("VDD_IN", 5000, 1000)]))
    for command in (smi(machine.root, ["[N/A], [N/A], [N/A], [N/A]"]), ("no-such-program",)):
        sensors, reading = machine.read(gpu=True, smi=command, wait=0.05)
        assert sensors.sources["power"] == "INA3221: VDD_IN" and reading.watts == pytest.approx(5, rel=0.01)


def test_several_stretches_as_one():
    both = merge([Reading(1, 1000, 900, 50, False, 4), Reading(3, 2000, 1000, None, True, 8)])
    assert both == Reading(4, 1500, 900, 50, True, 12) and both.watts == 3
    assert merge([Reading(1, joules=4), Reading(1)]).joules is None


def test_the_machine_that_runs_the_tests():
    sensors = Sensors()
    stop = sensors.watch()
    assert stop().seconds > 0 and set(sensors.sources) | set(sensors.missing) == {"frequency", "temperature", "throttling", "power"}
    sensors.close()
