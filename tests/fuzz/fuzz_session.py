"""Fuzzes the loading of a session with atheris; docs/security.md has the command."""
import atheris

with atheris.instrument_imports(include=["edgeattn.cache", "edgeattn.conversation"]):
    from loading import fuzz

if __name__ == "__main__":
    fuzz("session")
