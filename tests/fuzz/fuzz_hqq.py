"""Fuzzes the importer of hqq with atheris; docs/imports.md has the command."""
import atheris

with atheris.instrument_imports(include=["edgeattn.exporters"]):
    from importing import fuzz

if __name__ == "__main__":
    fuzz("hqq")
