"""Fuzzes the loading of a tokenizer and its chat template with atheris; docs/security.md has the command."""
import atheris

with atheris.instrument_imports(include=["edgeattn.tokenizer", "edgeattn.folder"]):
    from loading import fuzz

if __name__ == "__main__":
    fuzz("tokenizer")
