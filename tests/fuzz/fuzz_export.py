"""Fuzzes the loading of an exported folder with atheris; docs/security.md has the command."""
import atheris
import compiled  # noqa: F401

with atheris.instrument_imports(include=["edgeattn"]):
    from loading import fuzz

if __name__ == "__main__":
    fuzz("export")
