"""Random inputs that can be drawn again, the edgeattn command, and exports of the bundled model that are made once for a test session."""
import os
import random
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

NANO = Path(__file__).parent.parent / "models/nano"

# Every run draws other inputs and says from which seed; under CI it is always the same one: a check of a change must not fail by the draw.
SEED = int(os.environ.setdefault("EDGEATTN_TEST_SEED", "0" if "CI" in os.environ else str(random.randrange(1 << 16))))
draws, seeded = np.random.SeedSequence(SEED), np.random.default_rng


def default_rng(seed=None):
    """NumPy's, but what asks for any generator gets one that the run's seed and the test's name lead to."""
    return seeded(draws.spawn(1)[0] if seed is None else seed)


np.random.default_rng = default_rng


def pytest_report_header():
    return f"random inputs: EDGEATTN_TEST_SEED={SEED}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    global draws
    draws = np.random.SeedSequence([SEED, zlib.crc32(item.nodeid.encode())])
    random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


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
