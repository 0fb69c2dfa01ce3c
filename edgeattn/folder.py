"""Files of a model's folder. A folder comes from somewhere else: it may name, and link to, nothing outside itself."""
import json
import os
from pathlib import Path

LONGEST_JSON = 32 << 20  # bytes; as Python objects it may take twenty times as much


def inside(folder: str | Path, name: str) -> Path:
    """The path of a model folder's file, which need not be there.
    ValueError: the name or a link leads out of the folder. A Hugging Face cache keeps a snapshot's files as links into the `blobs` beside
    the snapshots; those count as the folder's own."""
    folder = Path(folder)
    if not isinstance(name, str) or not name or name in (".", "..") or any(c in "/\\:" or c < " " for c in name):
        raise ValueError(f"{folder}: what the model names must be a file of the same folder, got {str(name)[:200]!r}; export it again")
    path = folder / name
    if path.is_symlink():
        real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
        blobs = home.parent.parent / "blobs"
        if not real.is_relative_to(home) and not (home.parent.name == "snapshots" and real.parent == blobs):
            raise ValueError(f"{path}: is a link to {real}, outside the model's folder; put the file itself there")
    return path


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError when it is something else, or larger than a model's settings are."""
    if (size := path.stat().st_size) > LONGEST_JSON:
        raise ValueError(f"{path}: has {size >> 20} MiB, and a model's settings have at most {LONGEST_JSON >> 20}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a JSON object with names and values")
    return found
