"""The edgeattn command, and exports of the bundled model that are made once for a test session."""
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
    """A function: precision -> the folder of nano exported to it."""
    made = {}

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
