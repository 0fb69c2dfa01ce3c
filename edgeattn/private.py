"""Folders that belong to one user alone."""
import os
import stat
from contextlib import suppress
from pathlib import Path


def private(folder: Path) -> Path:
    """Make the folder, for this user alone: Numba keeps compiled code as pickles, so who can write there has his own code run.
    ValueError: another user owns it, or everybody could write to it or replace it."""
    with suppress(OSError):  # where nothing can be written, nothing is kept, and `edgeattn doctor` says so
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name != "posix" or not folder.exists():
        return folder
    about, own = folder.stat(), "set XDG_CACHE_HOME to a folder of your own"
    if about.st_uid != os.geteuid() or about.st_mode & 0o002:
        raise ValueError(f"{folder} holds compiled code, and other users could write there: remove it, or {own}")
    if about.st_mode & 0o077:  # a group's members could write, where the umask lets them
        folder.chmod(0o700)
    for path in folder.resolve().parents:
        if path.stat().st_mode & 0o002 and not path.stat().st_mode & stat.S_ISVTX:
            raise ValueError(f"{folder} holds compiled code, and everybody can write to {path}: chmod o-w {path}, or {own}")
    return folder
