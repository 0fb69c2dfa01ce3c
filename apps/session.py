"""edgeattn session: conversations that were saved with --session; and what chat and generate do with such a file."""
import argparse
import os
import sys
from pathlib import Path

from edgeattn.apps.terminal import plain

HELP = "list, show or remove what `chat --session` and `generate --session` have saved"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    folder = actions.add_parser("list", help="the sessions in a folder")
    folder.add_argument("path", metavar="FOLDER", nargs="?", default=".", help="where to look (the current folder)")
    show = actions.add_parser("show", help="check a session and print its facts and messages")
    show.add_argument("path", metavar="FILE")
    remove = actions.add_parser("rm", help="delete a session; any other file is refused")
    remove.add_argument("path", metavar="FILE")


def main(args: argparse.Namespace) -> int:
    return {"list": _list, "show": _show, "rm": _remove}[args.action](args.path)


def _list(folder):
    from edgeattn.cache.session_file import SessionError, read_metadata
    rows = []
    for path in sorted(Path(folder).iterdir()):
        try:
            metadata = read_metadata(path)
        except (OSError, SessionError):
            continue
        facts = _facts(metadata, path)
        rows.append([path.name, *(facts[name] for name in ("model", "tokens", "KV cache", "size", "date"))])
    if not rows:
        print(f"no sessions in {folder}", file=sys.stderr)
        return 0
    rows.insert(0, ["file", "model", "tokens", "KV cache", "size", "date"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(plain(cell, sys.stdout).ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def _show(path):
    import json
    from edgeattn.cache.session_file import SessionError, check, read_metadata
    metadata, state, code = _metadata(path, read_metadata), "complete", 0
    try:
        check(path)
    except SessionError as error:
        state, code = str(error), 1
    for name, value in (_facts(metadata, path) | {"state": state}).items():
        print(plain(f"{name:<10} {value}", sys.stdout))
    try:
        meta = json.loads(metadata.get("meta", ""))
        turns = [(turn["role"], turn["content"]) for turn in meta["messages"]] if "messages" in meta else [("text", meta["text"])]
    except (ValueError, LookupError, TypeError, RecursionError):
        return code or 1
    for role, content in turns:
        print(plain(f"\n{role}:\n{content}", sys.stdout))
    return code


def _remove(path):
    from edgeattn.cache.session_file import read_metadata
    _metadata(path, read_metadata)
    os.unlink(path)
    return 0


def _metadata(path, read):
    try:
        return read(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _facts(metadata, path):
    """What to tell of a session, as text."""
    import json
    from edgeattn.apps.terminal import size
    try:
        made = json.loads(metadata["settings"])
        kinds = made["k_type"] if made["k_type"] == made["v_type"] else f"{made['k_type']}/{made['v_type']}"
        kinds += f" {made['storage']}" if "storage" in made else ""
        kinds += f", {made['eviction']}" * (made["eviction"] != "none")
    except (ValueError, LookupError, TypeError, RecursionError):
        kinds = "?"
    return {"file": str(path), "model": metadata.get("model_name", "?"), "tokens": metadata.get("tokens", "?"), "KV cache": kinds,
            "size": size(os.path.getsize(path)), "date": metadata.get("date", "?"), "edgeattn": metadata.get("edgeattn", "?"),
            "format": metadata.get("version", "?")}


# ---- --session -----------------------------------------------------------------------------------------------------
def add_session(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--session", metavar="FILE", help=what)


class SessionFile:
    """The file of --session. Whatever is wrong with it is told in one line on stderr and never ends the program; a file that could not
    be continued, or that someone else has changed meanwhile, is not touched any more: then nothing is saved.

    path      None without --session, and from the moment when nothing is to be saved
    restored  tokens that were restored and are not used yet
    """

    def __init__(self, path: str | None):
        """ValueError: there is no such folder."""
        self.path, self.restored, self._seen, self._saved = path, 0, None, None
        if path is not None and not os.path.isdir(os.path.dirname(os.path.realpath(path))):
            raise ValueError(f"--session {path}: no such folder")
        self.exists = path is not None and os.path.lexists(path)

    def restore(self, load):
        """What load(path) returns; None when there is no file, or none that can be continued."""
        if self.path is None:
            return None
        from edgeattn.apps.cli import one_line
        from edgeattn.cache.pages import CacheFull
        self._seen = _identity(self.path)
        try:
            return load(self.path)
        except FileNotFoundError:
            return None
        except (ValueError, OSError, CacheFull, MemoryError) as error:
            self._give_up(f"not continued: {one_line(error).removeprefix(f'{self.path}: ')}")

    def save(self, write, state=None) -> None:
        """write(path), unless `state` is what it was at the last time."""
        if self.path is None or state is not None and state == self._saved:
            return
        if _identity(self.path) not in (self._seen, None):
            return self._give_up("was changed by another program meanwhile")
        try:
            write(self.path)
            self._seen, self._saved = _identity(self.path), state
        except (OSError, MemoryError) as error:
            print(f"session {self.path}: not saved: {getattr(error, 'strerror', None) or error or type(error).__name__}", file=sys.stderr)
        except KeyboardInterrupt:
            print(f"session {self.path}: not saved: interrupted", file=sys.stderr)

    def _give_up(self, why):
        print(f"session {self.path}: {plain(why)}; the file stays as it is, and nothing more is saved", file=sys.stderr)
        self.path = None

    def unchanged(self, state) -> None:
        """`state` is what the file holds already, or not worth saving."""
        self._saved = state

    def tell_reuse(self, timings) -> None:
        """Once, after the first answer: how much of what was restored could be used."""
        if self.restored:
            print(f"session: {timings.cached_tokens} of {self.restored} tokens reused, {timings.prompt_tokens} computed", file=sys.stderr)
        self.restored = 0


def _identity(path):
    """Changes whenever another program writes the file; None when it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
