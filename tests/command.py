"""Running the edgeattn command in tests."""
import subprocess
import sys

from edgeattn.apps import cli

EDGEATTN = [sys.executable, "-m", "edgeattn.apps.cli"]


def edgeattn(*arguments, stdin="", **settings):
    """Run the command in a process of its own."""
    return subprocess.run([*EDGEATTN, *map(str, arguments)], input=stdin, capture_output=True, text=True, timeout=300, **settings)


def fails(capsys, *arguments):
    """The one line that a user's mistake prints."""
    try:
        code = cli.main([str(a) for a in arguments])
    except SystemExit as leave:  # argparse
        code = leave.code
    out, err = capsys.readouterr()
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n") and "Traceback" not in err
    return err
