"""The wheel: what is in it, and that it works away from the source tree."""
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("edgeattn", "apps", "exporters", "kernels_cpu", "kernels_cuda")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")  # the build leaves files in its source tree
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_one_import_name_and_every_module(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"edgeattn"}
    for folder in FOLDERS:
        for path in (*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.jinja")):
            inside = path.relative_to(ROOT if folder != "edgeattn" else ROOT / folder)
            assert f"edgeattn/{inside}" in names


def test_installed_command_runs(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); import edgeattn.apps.cli as c; print(c.__file__); sys.exit(c.main())"
    for verb in ([], ["chat"], ["export"], ["bench"], ["doctor"]):
        command = [sys.executable, "-c", script, tmp_path / "site", *verb, "--help"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert str(tmp_path / "site") in done.stdout and "usage: edgeattn" in done.stdout
