"""edgeattn.json comes with a model too: what is missing in it, or no text that people may be shown, is refused before anything is read."""
import json

import pytest

from edgeattn.runtime import read_config


@pytest.fixture
def changed(tmp_path, nano_int4):
    """A function: an edit of a good edgeattn.json -> the folder with the edited one."""
    def write(edit):
        config = json.loads((nano_int4 / "edgeattn.json").read_text())
        edit(config)
        (tmp_path / "edgeattn.json").write_text(json.dumps(config))
        return tmp_path
    return write


@pytest.mark.parametrize("name, value", [("architecture", None), ("precision", 4), ("precision", "int4\x1b[2J"), ("precision", "x" * 1000),
                                         ("source", {"name": ["nano"]}), ("source", {"folder": "a\nb"}), ("weights", 3)])
def test_what_people_are_shown(changed, name, value):
    with pytest.raises(ValueError, match="must be") as error:
        read_config(changed(lambda config: config.update({name: value})))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["architecture", "precision", "model", "defaults"])
def test_parts_that_must_be_there(changed, name):
    with pytest.raises(ValueError, match="must be"):
        read_config(changed(lambda config: config.pop(name)))


@pytest.mark.parametrize("name", ["source", "files", "weights", "verify"])
def test_parts_that_may_be_missing(changed, name):
    assert read_config(changed(lambda config: config.pop(name)))[name] == {}
