"""The edgeattn command, and exports of the bundled model that are made once for a test session."""
import os
from pathlib import Path

import pytest

NANO = Path(__file__).parent.parent / "models/nano"


@pytest.fixture
def edgeattn(monkeypatch, capsys):
    from command import Command
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="session")
def nano_checkpoint():
    return NANO


@pytest.fixture(scope="session")
def nano_export(tmp_path_factory):
    """A function: precision -> the folder of nano exported to it. EDGEATTN_TEST_EXPORTS names a folder where nano-<precision> may be ready,
    for machines that are rented by the minute."""
    ready = Path(os.environ.get("EDGEATTN_TEST_EXPORTS", "no such folder"))
    made = {path.name.removeprefix("nano-"): path for path in ready.glob("nano-*")}

    def folder(precision):
        if precision not in made:
            from edgeattn.exporters.export import export
            made[precision] = tmp_path_factory.mktemp("exports") / f"nano-{precision}"
            export(NANO, made[precision], precision=precision)
        return made[precision]
    return folder


@pytest.fixture(scope="session")
def nano_fp32(nano_export):
    return nano_export("fp32")


@pytest.fixture(scope="session")
def nano_int4(nano_export):
    return nano_export("int4")
