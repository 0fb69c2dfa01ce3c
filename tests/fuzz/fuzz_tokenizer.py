"""Fuzzes the loading of a tokenizer and its chat template with atheris; docs/security.md has the command."""
import atheris
import compiled  # noqa: F401

with atheris.instrument_imports(include=["edgeattn"]):
    from loading import fuzz

if __name__ == "__main__":
    fuzz("tokenizer")
