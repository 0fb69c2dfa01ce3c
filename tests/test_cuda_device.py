"""What is said where CUDA cannot be used: one line, with the package to install. No GPU needed."""
import ctypes
import sys
from types import ModuleType, SimpleNamespace

import pytest

from edgeattn.kernels_cuda import compile, device


@pytest.fixture(autouse=True)
def fresh():
    """The functions remember what they found."""
    remembered = (device.driver, device.cupy)
    for function in remembered:
        function.cache_clear()
    yield
    for function in remembered:
        function.cache_clear()


def refused():
    with pytest.raises(ValueError) as error:
        device.cupy()
    message = str(error.value)
    assert "\n" not in message
    return message


def fake_cupy(monkeypatch, version):
    module = ModuleType("cupy")
    module.cuda = SimpleNamespace(runtime=SimpleNamespace(runtimeGetVersion=lambda: version))
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_without_a_driver(monkeypatch):
    def missing(name):
        raise OSError(name)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert "no NVIDIA driver was found" in refused()


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuInit=lambda flags: 100))
    assert "no GPU" in refused()


@pytest.mark.parametrize("version, extra", [((12, 4), "edgeattn[cuda12]"), ((13, 0), "edgeattn[cuda13]"), ((14, 1), "edgeattn[cuda13]")])
def test_without_cupy(monkeypatch, version, extra):
    monkeypatch.setattr(device, "driver_version", lambda: version)
    monkeypatch.setitem(sys.modules, "cupy", None)
    message = refused()
    assert "CuPy is not installed" in message and extra in message


def test_cupy_for_a_newer_driver(monkeypatch):
    monkeypatch.setattr(device, "driver_version", lambda: (12, 8))
    fake_cupy(monkeypatch, 13000)
    message = refused()
    assert "pip uninstall cupy-cuda13x" in message and "edgeattn[cuda12]" in message


def test_a_driver_older_than_any_cupy(monkeypatch):
    monkeypatch.setattr(device, "driver_version", lambda: (11, 4))
    assert "update the driver" in refused()


def test_cupy_that_fits(monkeypatch):
    monkeypatch.setattr(device, "driver_version", lambda: (13, 0))
    module = fake_cupy(monkeypatch, 13020)
    assert device.cupy() is module


def test_nothing_is_imported_before_cuda_is_chosen():
    """The kernels' modules import without CuPy; so do commands that never use them."""
    import importlib
    for path in compile.HERE.glob("*.py"):
        importlib.import_module(f"edgeattn.kernels_cuda.{path.stem}")


def test_a_source_holds_each_header_once():
    for path in compile.HERE.glob("*.cu"):
        text = compile.source(path.stem)
        assert "#include" not in text and text.count("typedef unsigned char u8;") == 1
