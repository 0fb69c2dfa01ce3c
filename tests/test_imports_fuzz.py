"""Damaged checkpoints are refused in one line: a few hundred, damaged at random, of each importer. tests/fuzz looks for longer."""
import random
import sys
import tracemalloc
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
from importing import CORPUS, damage, read  # noqa: E402
from make_corpus import write  # noqa: E402

LOADERS = ("gptq", "awq", "hqq", "gguf")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Valid checkpoints, made now."""
    folder = tmp_path_factory.mktemp("corpus")
    write(folder)
    return folder


@pytest.mark.parametrize("loader", LOADERS)
def test_corpus(corpus, loader):
    for path in [*sorted((corpus / loader).iterdir()), *sorted((CORPUS / loader).iterdir())]:
        refused = read(path.read_bytes(), loader == "gguf")
        assert (refused is None) == path.name.startswith("valid"), f"{path.name}: {refused}"


@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_at_random(corpus, loader):
    valid, seed, refused = [path.read_bytes() for path in sorted((corpus / loader).glob("valid*"))], random.randrange(1 << 32), 0
    tracemalloc.start()
    for i in range(200):
        rng = random.Random(seed + i)
        try:
            refused += read(damage(rng.choice(valid), rng, loader == "gguf"), loader == "gguf") is not None
        except Exception as error:
            raise AssertionError(f"seed {seed + i}") from error
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 50 and peak < 64 << 20
