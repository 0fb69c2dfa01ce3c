"""Fuzzes the loading of an exported folder's graph with atheris; docs/security.md has the command."""
import atheris

with atheris.instrument_imports(include=["edgeattn.graph", "edgeattn.contract", "edgeattn.exported", "edgeattn.folder", "edgeattn.plan", "edgeattn.segments",
                                          "edgeattn.views", "edgeattn.runtime"]):
    from loading import fuzz

if __name__ == "__main__":
    fuzz("export")
