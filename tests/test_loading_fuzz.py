"""Damaged exports, sessions and tokenizers are refused in one line, or run: some hundred, at random. tests/fuzz looks for longer."""
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
from loading import Loader, damage  # noqa: E402
from make_corpus import write_loaded  # noqa: E402

COUNTS = {"export": 150, "session": 200, "tokenizer": 100}
SEED = 9


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Valid ones, made now."""
    folder = tmp_path_factory.mktemp("corpus")
    write_loaded(folder)
    return folder


@pytest.mark.parametrize("kind", COUNTS)
def test_damaged_at_random(corpus, kind):
    loader, valid, refused = Loader(kind, corpus), [path.read_bytes() for path in sorted((corpus / kind).glob("valid*"))], 0
    assert [loader.read(blob) for blob in valid] == [None] * len(valid)
    for i in range(COUNTS[kind]):
        rng = random.Random(SEED + i)
        try:
            refused += loader.read(damage(rng.choice(valid), rng, kind)) is not None
        except Exception as error:
            raise AssertionError(f"seed {SEED + i}") from error
    assert refused > COUNTS[kind] // 2
