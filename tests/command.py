"""Running the edgeattn command in tests."""
import io
import sys
from types import SimpleNamespace

from edgeattn.apps import cli

EDGEATTN = [sys.executable, "-m", "edgeattn.apps.cli"]


class Command:
    """edgeattn("verb", ...) in this process, as if through pipes -> returncode, stdout, stderr (less the progress lines)."""

    def __init__(self, monkeypatch, capsys):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments, stdin=""):
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as leave:  # argparse
            code = leave.code
        out, err = self._capsys.readouterr()
        lines = [line for line in err.splitlines(keepends=True) if not line.endswith(" ...\n")]
        return SimpleNamespace(returncode=code, stdout=out, stderr="".join(lines))

    def fails(self, *arguments):
        """The one line that a user's mistake prints."""
        done = self(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n")
        return done.stderr
